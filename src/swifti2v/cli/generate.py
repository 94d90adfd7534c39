"""``swifti2v generate``: a photo and a prompt to a video."""

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import GenerateOptions, takes_options
from swifti2v.cli.weights import require_weights


@takes_options(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Turn a photo and a prompt into a video, one segment after the other."""
    with exit_codes(debug=options.debug):
        request = options.to_request(options.image)
        require_weights(options)
        from swifti2v.cli.run import run_command  # torch and diffusers take seconds to import

        run_command(request, dry_run=options.dry_run, as_json=options.as_json)
