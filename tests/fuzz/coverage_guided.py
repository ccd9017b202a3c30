"""The readers of weights under libFuzzer, which looks for bytes that reach new lines of their code.

    python -m tests.fuzz.coverage_guided CORPUS [-runs=30000] [-seed=1]

Needs the package atheris, which the house does not install. CORPUS is a folder of its own, filled with one
good file of each kind and with what was found since. An exception that is no UserError ends it, and leaves
the input in the working directory as crash-HASH. Not a test file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save

from shared.errors import UserError

SUFFIXES = (".safetensors", ".pt")
INSTRUMENTED = ["shared.doctor", "shared.checkpoints", "zipfile", "pickletools"]


def seeds(folder: Path) -> None:
    """One good file of each kind; the first byte of an input chooses the file's suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, 3, dtype=torch.float16)}
    (folder / "safetensors").write_bytes(b"\0" + save(tensors, {"format": "pt"}))
    for name, zipped in (("zip", True), ("old", False)):
        torch.save({"module": tensors}, folder / name, _use_new_zipfile_serialization=zipped)
        (folder / name).write_bytes(b"\1" + (folder / name).read_bytes())


def main() -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=INSTRUMENTED):
        from shared.checkpoints import load_metadata, load_tensors

    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"a{suffix}" for suffix in SUFFIXES]

        def one(data: bytes) -> None:
            file = files[data[0] % len(files) if data else 0]
            file.write_bytes(data[1:])
            for reader in (lambda: load_tensors(file, device="meta"), lambda: load_tensors(file)):
                try:
                    reader()
                except UserError:
                    continue
                if file.suffix == ".safetensors":
                    load_metadata(file)

        corpus = next(word for word in sys.argv[1:] if not word.startswith("-"))
        seeds(Path(corpus))
        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
