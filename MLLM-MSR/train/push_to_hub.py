"""Upload an adapter or a merged model, and what was derived from the data, to the Hugging Face hub.

In:  {output_dir}/{system}/adapter/ (or --folder), {output_dir}/metrics.json for its card
     with --derived: {output_dir}/{system}/image_summaries.jsonl, user_preferences.jsonl
Out: repository --repo_id (a model); with --derived also --derived_repo_id (a data set)

    hf auth login
    python MLLM-MSR/train/push_to_hub.py --config configs/microlens.yaml --repo_id NAME/mllm-msr

Never uploaded: raw data, and files that hold titles or histories (users, items, train, validation,
test). The repository is private unless --private false. The card has the test metrics of the
variant `--variant`.
"""

from mllmrec.stage.main import run_main

from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require
from mllmrec.stage.options import NAME, CommonOptions, option, parse_options, print_options
from mllmrec.stage.record import check_described, read_record

SECTION = "push"
DERIVED = ("image_summaries.jsonl", "user_preferences.jsonl")
MODEL_FILES = ["*.json", "*.safetensors", "*.md", "*.jinja", "*.model", "*.txt"]


@dataclass
class Options(CommonOptions):
    repo_id: str = option("", "repository of the weights, NAME/REPOSITORY")
    folder: str = option("", "what is uploaded; default: {output_dir}/{system}/adapter")
    variant: str = option("sft", "variant of metrics.json whose metrics the card has", pattern=NAME)
    private: bool = option(True, "make a new repository private")
    derived: bool = option(False, "also upload image summaries and preferences")
    derived_repo_id: str = option("", "their repository, a data set")


def card(folder, options):
    """The text of the model card, with the test metrics if there are some."""
    from mllmrec.evaluation.metrics import SHOWN
    from mllmrec.evaluation.result_tables import half_width, read_metrics
    from mllmrec.models.model_card import model_card

    record = read_record(options.system_dir / "adapter")
    if record is None:
        raise InputError(f"{options.system_dir / 'adapter'} has no run record; train it first")
    path, shown = Path(options.output_dir) / "metrics.json", {}
    found = read_metrics(path).get(options.variant) if path.exists() else None
    for name in SHOWN if found else ():
        shown[name.upper()] = f"{100 * found[name]:.2f} ± {half_width(found, name) or 0:.2f} (x100)"
    return model_card(record, shown, merged=folder.name == "merged")


def upload(folder, options, api):
    """Upload the weights with their card, and the derived files. api: huggingface_hub.HfApi."""
    text = card(folder, options)
    api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    ignored = ["README.md", "run.json"]
    api.upload_folder(
        repo_id=options.repo_id,
        folder_path=str(folder),
        allow_patterns=MODEL_FILES,
        ignore_patterns=ignored,
    )
    api.upload_file(
        path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=options.repo_id
    )
    print(f"uploaded {folder} to {options.repo_id}")
    for name in DERIVED if options.derived else ():
        path = require(options.system_dir / name)
        repository = options.derived_repo_id
        api.create_repo(repository, repo_type="dataset", private=options.private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=str(path), path_in_repo=name, repo_id=repository, repo_type="dataset"
        )
        print(f"uploaded {path} to {repository}")


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "upload to the hub")
    if not options.repo_id or (options.derived and not options.derived_repo_id):
        missing = "--derived_repo_id" if options.repo_id else "--repo_id"
        raise InputError(f"{missing} is missing; name a repository, NAME/REPOSITORY")
    folder = Path(options.folder or options.system_dir / "adapter")
    record = read_record(folder)
    if record is None:
        raise InputError(
            f"{folder} has no run record, so it is no output of a stage here; name the folder of "
            "an adapter or a merged model"
        )
    check_described(folder, record)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        upload(folder, options, HfApi())
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the upload failed: {reason}; log in with `hf auth login`") from None


if __name__ == "__main__":
    run_main(main)
