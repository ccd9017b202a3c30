"""Tables of token clusters: k-means of the codebook, users' files, the verb, and sampling by them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo_ar.__main__ import main
from cogvideo_ar.clusters import clusters_mark, make_clusters, read_clusters, write_clusters
from cogvideo_ar.formats import open_folder
from cogvideo_ar.parts import save_parts
from cogvideo_ar.pipeline import CogVideoPipeline
from shared.errors import OutputPathError, SettingError, WeightsError
from tests.cogvideo_ar.tiny_pipeline import NUM_IMAGE_TOKENS, tiny_parts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder without a table."""
    from dataclasses import replace

    return save_parts(replace(tiny_parts(tmp_path), cluster_labels=None), tmp_path / "model")


def blobs(count: int, each: int) -> torch.Tensor:
    """Rows around `count` distant points."""
    random = torch.Generator().manual_seed(0)
    points = 20 * torch.randn(count, 6, generator=random).repeat_interleave(each, 0)
    return points + torch.randn(points.shape, generator=random)


def test_clusters_of_the_codebook():
    codes = blobs(5, 8)
    labels = make_clusters(codes, 5, seed=1)
    assert torch.equal(labels, make_clusters(codes, 5, seed=1))
    assert sorted(labels.bincount().tolist()) == [8] * 5
    assert all(len(part.unique()) == 1 for part in labels.view(5, 8))
    assert len(make_clusters(blobs(8, 10)).unique()) == 80 // 40
    with pytest.raises(SettingError, match="num_clusters 41 is not possible; legal: 1 to 40"):
        make_clusters(codes, 41)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_tables_are_written_and_read(tmp_path: Path, name: str):
    labels = torch.arange(12) % 5
    assert torch.equal(read_clusters(write_clusters(labels, tmp_path / name), 12), labels)
    with pytest.raises(WeightsError, match=r"has the shape \[12\], needed is one label for 13 tokens"):
        read_clusters(tmp_path / name, 13)
    assert clusters_mark(labels) != clusters_mark(labels.flip(0))


def test_a_full_disk_leaves_no_half_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def half(path: Path, _labels: np.ndarray) -> None:
        Path(path).write_bytes(b"\x93NUMPY")
        raise OSError(errno.ENOSPC, "No space left on device")

    table = write_clusters(torch.arange(3), tmp_path / "table.npy")
    monkeypatch.setattr(np, "save", half)
    with pytest.raises(OutputPathError, match="No space left"):
        write_clusters(torch.arange(4), table)
    assert read_clusters(table, 3).tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [table]


def test_a_table_goes_with_its_model(tmp_path: Path):
    """Another model in its folder has none."""
    from dataclasses import replace

    folder = save_parts(tiny_parts(tmp_path), tmp_path / "model")
    assert open_folder(folder).clusters is not None
    save_parts(replace(tiny_parts(tmp_path, seed=1), cluster_labels=None), folder)
    assert open_folder(folder).load(torch.float32, torch.device("cpu")).cluster_labels is None


def test_bad_tables_are_named(tmp_path: Path):
    np.save(tmp_path / "float.npy", np.zeros(4))
    np.save(tmp_path / "negative.npy", -np.ones(4, int))
    (tmp_path / "text.npy").write_text("no")
    for name, reason in (
        ("float.npy", "whole numbers"),
        ("negative.npy", "whole numbers"),
        ("text.npy", "not an array"),
        ("none.safetensors", "there is no file"),
    ):
        with pytest.raises(WeightsError, match=reason):
            read_clusters(tmp_path / name, 4)


def test_the_verb_stores_a_table_beside_the_checkpoint(model: Path, tmp_path: Path, capsys):
    words = ["clusters", "--model_path", str(model), "--num_clusters", "6", "--seed", "2"]
    assert open_folder(model).clusters is None
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["clusters"] == 6 and said["path"] == str(model / "cluster_labels.safetensors")
    pipeline = CogVideoPipeline.from_pretrained(model, device="cpu")
    labels = pipeline.parts.cluster_labels
    assert labels is not None
    assert torch.equal(labels, make_clusters(pipeline.parts.vqvae.quantizer.codebook, 6, seed=2))
    assert pipeline.settings()["token_clusters"] == clusters_mark(labels)
    assert main(words) == 2 and "already exists" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--from_file", "x.npy"]) == 2
    capsys.readouterr()
    assert main(["clusters", "--model_path", "demo"]) == 2 and "--output_path" in capsys.readouterr().err


def test_a_user_s_table_is_taken_over_or_used_once(model: Path, tmp_path: Path, capsys):
    table = tmp_path / "mine.npy"
    np.save(table, np.arange(NUM_IMAGE_TOKENS) % 3)
    out = tmp_path / "copy.npy"
    words = ["clusters", "--model_path", str(model), "--from_file", str(table), "--output_path", str(out)]
    assert main(words) == 0 and np.array_equal(np.load(out), np.load(table))
    common = [
        "generate",
        "--prompt",
        "a red circle",
        "--model_path",
        str(model),
        "--device",
        "cpu",
        "--quiet",
    ]
    common += ["--rounds", "0", "--top_k", "1"]
    videos, marks = [], []
    for name, more in (("with", ["--clusters", str(table)]), ("without", [])):
        path = tmp_path / f"{name}.mkv"
        assert main([*common, *more, "--output_path", str(path)]) == 0
        videos.append(path.read_bytes())
        marks.append(json.loads(path.with_suffix(".json").read_text())["settings"]["token_clusters"])
    assert videos[0] != videos[1] and marks == [clusters_mark(torch.arange(NUM_IMAGE_TOKENS) % 3), None]
    capsys.readouterr()
    assert main([*common, "--clusters", str(tmp_path / "no.npy"), "--output_path", str(out)]) in (2, 3)
