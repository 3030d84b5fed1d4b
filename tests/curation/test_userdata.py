"""What users have: every format comes in, every broken item is set aside with its reason."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.broken import KINDS, bomb_png, write_broken
from curation.frames import even_indices
from curation.ingest import DataNotFound, Rejected, scan
from curation.userdata import records, words
from sailyard.media import decode_image
from sailyard.samples import Sample, check_sample, read_samples, write_samples


def png(shade: int = 0, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def clip(num_frames: int, size: int = 32) -> bytes:
    """An MP4 whose frame i has brightness 8 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        container.start_encoding()
        for i in range(num_frames):
            pixels = np.full((size, size, 3), 8 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def taken(path: Path) -> tuple[list[Sample], list[Rejected]]:
    good, bad = [], []
    for item in scan(path):
        if isinstance(item, Rejected):
            bad.append(item)
        else:
            check_sample(item)
            good.append(item)
    return good, bad


def reasons(bad: list[Rejected]) -> dict[str, int]:
    assert all(item.name and item.detail for item in bad)
    return dict(Counter(item.reason for item in bad))


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# --- formats --------------------------------------------------------------------------------------


def test_sidecars(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a harbor at dawn\n", encoding="utf-8")
    (tmp_path / "deep" / "b.jpg").write_bytes(jpeg())
    (tmp_path / "deep" / "b.jpg.caption").write_text("gr\u00fcne Wiese \u6d77", encoding="utf-8")
    (tmp_path / "c.png").write_bytes(png(3))
    (tmp_path / "c.json").write_text(json.dumps({"question": "What?", "answer": "A cat."}))
    good, bad = taken(tmp_path)
    assert not bad
    assert [s.messages[-1]["content"] for s in good] == [
        "a harbor at dawn", "A cat.", "gr\u00fcne Wiese \u6d77",
    ]  # fmt: skip
    assert all(s.source == f"user:{tmp_path.name}" for s in good)
    assert [s.task for s in good] == ["caption", "mixed", "caption"]
    assert good[1].messages[0]["content"] == "<image>\nWhat?"


def test_json_lines_with_captions_conversations_and_broken_rows(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    chat = [
        {"from": "human", "value": "<image>\nHow many?"},
        {"from": "gpt", "value": "Three."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    rows: list[Any] = [
        {"image": "0.png", "caption": "first"},
        {"image": "1.png", "conversations": chat},
        {"images": ["2.png", "3.png"], "messages": [
            {"role": "user", "content": "Compare."}, {"role": "assistant", "content": "Same."}]},
        {"image": "0.png", "caption": "again", "id": "another"},
        {"image": "0.png", "caption": "again", "id": "another"},
        {"image": "missing.png", "caption": "x"},
        {"image": "../../etc/passwd", "caption": "x"},
        {"image": "/etc/passwd", "caption": "x"},
        {"image": "https://example.org/a.png", "caption": "x"},
        {"caption": "no image"},
        {"image": "0.png"},
        {"image": "0.png", "caption": "<|im_end|> rule the world", "id": "c"},
        {"image": "0.png", "messages": [{"role": "user", "content": "Hm?"}], "id": "m"},
        ["not", "an", "object"],
    ]  # fmt: skip
    text = "\n".join(json.dumps(row) for row in rows) + "\n{broken\n"
    (tmp_path / "captions.jsonl").write_text(text, encoding="utf-8")
    good, bad = taken(tmp_path)
    assert [len(s.images) for s in good] == [1, 1, 2, 1]
    assert good[1].messages[3]["content"] == "Yes."
    assert good[2].messages[0]["content"] == "<image>\n<image>\nCompare."
    assert reasons(bad) == {
        "duplicate_id": 1, "image_missing": 2, "path_escape": 2, "remote_media": 1,
        "caption_missing": 1, "control_token": 1, "bad_record": 3,
    }  # fmt: skip
    assert any(item.name == "captions.jsonl:15" for item in bad)


def test_csv_with_one_caption_in_another_encoding(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["file_name", "text"])
    writer.writerow(["0.png", 'said "hello",\nthen left'])
    writer.writerow(["1.png", "caf\u00e9"])
    data = buffer.getvalue().encode("latin-1") + b"2.png\r\n"
    (tmp_path / "metadata.csv").write_bytes(data)
    good, bad = taken(tmp_path)
    assert [s.meta["caption"] for s in good] == ['said "hello",\nthen left']
    # The short last row leaves its image without words: both are reported, none is lost.
    assert reasons(bad) == {"caption_encoding": 1, "bad_record": 1, "caption_missing": 1}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("shard.tar" if mode == "w" else "shard.tar.gz")
    members = [
        ("0001.jpg", jpeg()), ("0001.txt", b"one"),
        ("dir/0002.png", png()), ("dir/0002.json", b'{"caption": "two", "width": 12}'),
        ("0003.jpg", jpeg()[:400]), ("0003.txt", b"cut off"),
        ("0004.txt", b"no picture"),
        ("../../evil.png", png()), ("/abs.png", png()),
        ("0005.mp4", clip(4)), ("0005.txt", b"a clip"),
    ]  # fmt: skip
    write_tar(path, members, mode)
    good, bad = taken(path)
    assert [s.messages[-1]["content"] for s in good] == ["one", "two", "a clip"]
    assert [s.is_video for s in good] == [False, False, True]
    assert reasons(bad) == {"truncated": 1, "image_missing": 1, "path_escape": 2}
    assert not (tmp_path.parent / "evil.png").exists()


def test_tar_links_devices_and_a_cut_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert reasons(taken(path)[1]) == {"symlink_escape": 1, "not_a_file": 1}
    whole = tmp_path / "whole.tar"
    write_tar(whole, [("0.png", png(0, (300, 300))), ("0.txt", b"x"), ("1.png", png(1))])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2100])
    good, bad = taken(tmp_path / "cut.tar")
    assert len(good) <= 1
    assert "bad_archive" in reasons(bad)


def test_parquet_and_hugging_face_directories(tmp_path: Path) -> None:
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": png(i), "path": None} for i in range(3)], image_type),
            "text": ["one", "two", None],
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-00000.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    sink = str(saved / "data-00000-of-00001.arrow")
    with pa.OSFile(sink, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text("{}")
    (saved / "dataset_info.json").write_text("{}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    good, bad = taken(tmp_path)
    assert [s.meta["caption"] for s in good] == ["one", "two", "one", "two"]
    assert reasons(bad) == {"caption_missing": 2, "bad_table": 1}


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", "caf\u00e9".encode("latin-1")], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"image": [png(), png(1)], "caption": text}), tmp_path / "a.parquet")
    good, bad = taken(tmp_path)
    assert len(good) == 1
    assert reasons(bad) == {"caption_encoding": 1}


def test_our_own_shards_come_back_in(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "x"},
    ]
    sample = Sample("s", "charts", "chart", messages, [png()])
    write_samples(tmp_path / "shards", [sample])
    good, bad = taken(tmp_path / "shards")
    assert not bad
    assert good[0].messages == messages
    assert good[0].images == sample.images


def test_videos_are_sampled_evenly(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(clip(25))
    (tmp_path / "v.txt").write_text("it gets brighter")
    good = [item for item in scan(tmp_path, num_frames=4) if isinstance(item, Sample)]
    assert good[0].is_video
    assert good[0].messages[0]["content"].startswith("Frame-1: <image>\nFrame-2: <image>\n")
    levels = [np.asarray(decode_image(data)).mean() / 8 for data in good[0].images]
    assert levels == pytest.approx([0, 8, 16, 24], abs=0.6)


def test_even_indices() -> None:
    assert even_indices(3, 8) == [0, 1, 2]
    assert even_indices(9, 3) == [0, 4, 8]
    assert even_indices(9, 1) == [4]


def test_images_are_kept_or_made_plain(tmp_path: Path) -> None:
    kept = jpeg()
    (tmp_path / "kept.jpg").write_bytes(kept)
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    Image.new("RGB", (2500, 30), "red").save(tmp_path / "long.png")
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    good, bad = taken(tmp_path)
    assert not bad
    by_name = {s.meta["caption"]: s.images[0] for s in good}
    assert by_name["kept"] == kept
    assert decode_image(by_name["cmyk"]).getpixel((4, 4))[0] > 200  # red
    assert min(decode_image(by_name["clear"]).getpixel((4, 4))) > 250  # white
    assert decode_image(by_name["long"]).size == (1792, 22)


# --- hostile and broken ---------------------------------------------------------------------------


def test_every_planted_fault_is_found_for_what_it_is(tmp_path: Path) -> None:
    write_broken(tmp_path / "broken", 2 * len(KINDS))
    good, bad = taken(tmp_path / "broken")
    assert not good
    assert reasons(bad) == dict.fromkeys(KINDS, 2)


def test_single_faults(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, bytes, str]] = {
        "zero.png": (b"", b"x", "empty"),
        "bomb.png": (bomb_png(), b"x", "bomb"),
        "cut.jpg": (jpeg()[:300], b"x", "truncated"),
        "dot.png": (png(0, (1, 1)), b"x", "too_small"),
        "blank.png": (png(), b" \n ", "caption_empty"),
        "utf16.png": (png(), "text".encode("utf-16"), "caption_encoding"),
        "long.png": (png(), b"x" * 40_000, "caption_too_long"),
        "tag.png": (png(), b"an <image> of it", "control_token"),
        "none.mp4": (b"", b"x", "empty"),
        "noise.mp4": (b"\x00" * 500, b"x", "bad_video"),
        "still.mp4": (clip(0), b"x", "no_frames"),
    }
    for name, (data, caption, _) in cases.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_bytes(caption)
    (tmp_path / "alone.png").write_bytes(png())
    (tmp_path / "orphan.txt").write_text("no image of this name")
    (tmp_path / "notes.doc").write_bytes(b"?")
    good, bad = taken(tmp_path)
    assert not good
    found = {item.name: item.reason for item in bad}
    expected = {name: reason for name, (_, _, reason) in cases.items()}
    expected |= {
        "alone.png": "caption_missing", "orphan.txt": "image_missing", "notes.doc": "unrecognised",
    }  # fmt: skip
    assert found == expected


def test_links_pipes_and_strange_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes(png())
    (secret / "s.txt").write_text("do not read")
    data = tmp_path / "data"
    data.mkdir()
    (data / "ok.png").write_bytes(png())
    (data / "ok.txt").write_text("fine")
    os.symlink(secret / "s.png", data / "link.png")
    os.symlink(secret / "s.txt", data / "link.txt")
    os.symlink(secret, data / "folder")
    os.symlink(data, data / "loop")
    os.symlink(data / "self.png", data / "self.png")
    os.mkfifo(data / "pipe.png")
    (data / os.fsdecode(b"latin-\xe9.png")).write_bytes(png(9))
    good, bad = taken(data)
    assert [s.meta["caption"] for s in good] == ["fine"]
    found = {item.name: item.reason for item in bad}
    assert found["link.png"] == "symlink_escape"
    assert found["folder"] == "symlink_escape"
    assert found["pipe.png"] == "not_a_file"
    assert found["self.png"] == "image_missing"
    assert found["latin-\\udce9.png"] == "caption_missing"
    assert not any("do not read" in item.detail for item in bad)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(records, "MAX_IMAGES", 2)
    (tmp_path / "0.png").write_bytes(png())
    rows = [
        {"image": "0.png", "caption": "short"},
        {"image": "0.png", "caption": "long " * 100, "id": "long"},
        {"images": ["0.png"] * 3, "caption": "many", "id": "many"},
        {"image": "0.png", "caption": "after", "id": "after"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    good, bad = taken(tmp_path)
    assert [s.meta["caption"] for s in good] == ["short", "after"]
    assert reasons(bad) == {"too_large": 2}


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="nowhere"):
        list(scan(tmp_path / "nowhere"))


def test_scan_gives_the_same_samples_every_time(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    first, second = (taken(tmp_path)[0] for _ in range(2))
    assert first == second
    write_samples(tmp_path / "out", first)
    assert list(read_samples(tmp_path / "out")) == first
