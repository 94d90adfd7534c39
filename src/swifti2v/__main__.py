"""``python -m swifti2v``, which ``torchrun -m swifti2v`` needs."""

from swifti2v.cli import app

if __name__ == "__main__":
    app()
