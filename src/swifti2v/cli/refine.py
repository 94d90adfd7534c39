"""``swifti2v refine``: a low-resolution clip and its first frame in full detail to a video."""

from dataclasses import replace

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import RefineOptions, takes_options
from swifti2v.cli.weights import require_weights


@takes_options(RefineOptions)
def refine(options: RefineOptions) -> None:
    """Bring a low-resolution clip to full size with the detail of a photo (Stage II alone)."""
    with exit_codes(debug=options.debug):
        request = options.to_request(options.image, options.motion)
        request = replace(request, no_audio=options.no_audio)
        require_weights(options)
        from swifti2v.cli.run import run_command  # torch and diffusers take seconds to import

        run_command(request, dry_run=options.dry_run, as_json=options.as_json)
