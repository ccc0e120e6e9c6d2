"""The targets: what a stranger's bytes may reach, and the valid inputs to start from."""

import io
import json
import os
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdeploy.bundle import read_manifest
from vlmdeploy.data.sft311k import FOLDER_NAMES
from vlmdeploy.data.source import open_source
from vlmdeploy.manifest import MANIFEST_NAME, ImageRecipe
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.tokenizer import import_tokenizer
from vlmdeploy.plan.device import plan_device
from vlmdeploy.quant.quantization_report import read_report
from vlmdeploy.runtime.chat import Tokenizer, read_messages
from vlmdeploy.runtime.graph_check import check_graph
from vlmdeploy.runtime.image import load_image, preprocess
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.replay import read_record
from vlmdeploy.runtime.session import open_bundle
from vlmdeploy.runtime.summary import bundle_rows, engine_rows
from vlmdeploy.score.predictions import read_predictions
from vlmdeploy.sweep.grid import read_grid
from vlmdeploy.train.config import load_config
from vlmdeploy.train.state import STATE, Place, load_place

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"
RECIPE = ImageRecipe(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # a PNG
MOST_ITEMS = 20  # rows of a data set that an input is asked for

Check = Callable[[bytes, Path], Any]


@dataclass(frozen=True)
class Models:
    """Tiny models that targets change a file of."""

    checkpoint: Path
    quantized: Path
    bundle: Path


@dataclass(frozen=True)
class Target:
    """check: takes the bytes and a folder of its own, which holds a copy of `copied`. seeds: valid inputs. is_json:
    they are JSON, so that values can be changed, not only bytes."""

    check: Check
    seeds: Callable[[Models], list[bytes]]
    copied: Callable[[Models], Path] | None = None
    is_json: bool = False


def make_models(folder: Path) -> Models:
    """Write the models into a folder, once."""
    from tests.gptq_checkpoint import write_gptq_checkpoint
    from tests.tiny_bundle import export, write_text_checkpoint

    models = Models(folder / "checkpoint", folder / "quantized", folder / "bundle")
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.{os.getpid()}")
        write_text_checkpoint(aside / "checkpoint", seed=5)
        write_gptq_checkpoint(aside / "quantized")
        export(aside / "checkpoint", aside / "bundle", "ort-int4")
        aside.rename(folder)
    return models


def signed(body: bytes) -> bytes:
    """The bytes of a manifest that end in their own hash, as anybody can write it."""
    start = body.rstrip().removesuffix(b"}").rstrip() + b',\n "sha256": "'
    return start + sha256(start).hexdigest().encode() + b'"\n}\n'


def _unsigned(bundle: Path) -> bytes:
    content = json.loads((bundle / MANIFEST_NAME).read_bytes())
    del content["sha256"]
    return json.dumps(content, indent=1).encode()


def _put(path: Path, content: bytes) -> None:
    """Write a file of a room; the old one is a link to the model's own."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _image(data: bytes, folder: Path) -> None:
    preprocess(load_image(data), RECIPE)


def _manifest(data: bytes, folder: Path) -> None:
    _put(folder / MANIFEST_NAME, signed(data))
    manifest = read_manifest(folder)
    bundle_rows(manifest)
    engine_rows(manifest)


def _bundle(data: bytes, folder: Path) -> None:
    """A manifest that passes is run: what it says must not lead the runtime astray."""
    _put(folder / MANIFEST_NAME, signed(data))
    with open_bundle(folder, threads=1) as session:
        size_px = session.manifest.image.size_px
        list(islice(session.generate([{"role": "user", "content": "Why?"}], max_new_tokens=2), 3))
        pixels = np.zeros((1, 3, size_px, size_px), np.float32)
        rows = session.manifest.tokens.rows_per_image
        ids = [session.manifest.tokens.bos_id, *[session.manifest.tokens.placeholder_id] * rows, 5]
        session.generate_ids(np.array(ids), pixels, 1)


def _graph(data: bytes, folder: Path) -> None:
    names = ("decoder_text", "decoder_vision", "vision")
    name = next((name for name in names if f"{name}.data".encode() in data), names[-1])
    check_graph(data, f"{name}.onnx", f"{name}.data", 1 << 20)


def _reference(data: bytes, folder: Path) -> None:
    from tests.tiny_bundle import sign_again

    _put(folder / "reference.npz", data)
    sign_again(folder)
    read_record(check_bundle(folder))


def _in_checkpoint(name: str) -> Check:
    def check(data: bytes, folder: Path) -> None:
        _put(folder / name, data)
        checkpoint = Checkpoint(folder)
        checkpoint.parameter(next(iter(checkpoint.rules)))
        read_report(folder)

    return check


def _tokenizer(name: str) -> Check:
    def check(data: bytes, folder: Path) -> None:
        _put(folder / name, data)
        tokenizer = Tokenizer(import_tokenizer(folder / name))
        tokenizer.decode(tokenizer.encode("Where is the 7?"))

    return check


def _messages(data: bytes, folder: Path) -> None:
    try:
        messages = json.loads(data)
    except (ValueError, RecursionError):
        return
    for source in read_messages(messages, 1).images:
        if not isinstance(source, str) or source.startswith("data:"):  # paths are the caller's own affair
            load_image(source)


def _data(name: str) -> Check:
    def check(data: bytes, folder: Path) -> None:
        _put(folder / name, data)
        _put(folder / "a.png", b64decode(PIXEL))
        list(islice(open_source(folder / name).samples(), MOST_ITEMS))

    return check


def _label(data: bytes, folder: Path) -> None:
    root = folder / FOLDER_NAMES[0]
    for name, content in (("labels_en/1.json", data), ("images/1.png", b64decode(PIXEL))):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(content)
    list(open_source(folder).samples())


def _state(data: bytes, folder: Path) -> None:
    _put(folder / STATE, data)
    load_place(folder, 2)


def _predictions(name: str) -> Check:
    def check(data: bytes, folder: Path) -> None:
        _put(folder / name, data)
        read_predictions(folder / name)

    return check


def _toml(read: Callable[[Path], object]) -> Check:
    def check(data: bytes, folder: Path) -> None:
        _put(folder / "file.toml", data)
        read(folder / "file.toml")

    return check


def _pictures(models: Models) -> list[bytes]:
    seeds = []
    picture = Image.effect_noise((9, 7), 60)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "JPEG2000"):
        for mode in ("L", "RGB", "RGBA", "P", "I;16"):
            content = io.BytesIO()
            try:
                picture.convert("L").convert(mode).save(content, kind)
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
            seeds.append(content.getvalue())
    content = io.BytesIO()
    picture.save(content, "GIF", save_all=True, append_images=[picture.rotate(90)] * 2)
    progressive = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(progressive, "JPEG", progressive=True, exif=turned)
    return [*seeds, content.getvalue(), progressive.getvalue()]


def _message_seeds(models: Models) -> list[bytes]:
    url = f"data:image/png;base64,{PIXEL}"
    parts = [{"type": "text", "text": "Why?"}, {"type": "image_url", "image_url": {"url": url}}]
    turns = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": parts},
    ]  # fmt: skip
    return [json.dumps(turns).encode(), json.dumps(turns[:1]).encode()]


def _rows(models: Models) -> list[bytes]:
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "task": "vqa"}
    extra = {**row, "answers": ["a", "b"], "options": {"A": "cat"}, "boxes": [[0, 0, 1.5, 2]], "template": "chat"}
    return [b"\n".join(json.dumps(each).encode() for each in (row, extra))]


def _refcoco(models: Models) -> list[bytes]:
    line = {"image": "a.png", "bbox": [1, 2, 3, 4], "sent": "the left one", "width": 9, "height": 7}
    return [json.dumps(line).encode() + b"\n"]


def _coco(models: Models) -> list[bytes]:
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 7}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4], "caption": "the left one"}],
    }
    return [json.dumps(document).encode()]


def _table(models: Models) -> list[bytes]:
    head = "index\timage\tquestion\tA\tB\tanswer\tsplit\n"
    return [(head + f'1\t{PIXEL}\tWhat?\tcat\tdog\tA\tval\n2\t1\t"a ""b"""\tx\ty\tB\tval\n').encode()]


def _sheet(models: Models) -> list[bytes]:
    from openpyxl import Workbook

    book, content = Workbook(), io.BytesIO()
    sheet = book.active
    assert sheet is not None, "a new workbook has a sheet"
    for row in (["index", "question", "prediction"], [1, "What?", "cat"], [2, None, 3.5]):
        sheet.append(row)
    book.save(content)
    return [content.getvalue()]


def _labels(models: Models) -> list[bytes]:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    captions = [{"role": "caption", "content": "A cat."}]
    return [json.dumps({"conversations": turns}).encode(), json.dumps({"captions": captions}).encode()]


def _states(models: Models) -> list[bytes]:
    import torch

    content = io.BytesIO()
    flat = {name: torch.ones(3) for name in ("values", "first", "second")}
    torch.save({**vars(Place()), **flat, "num_steps": 1}, content)
    return [content.getvalue()]


def _index(checkpoint: Path) -> bytes:
    weight_map = Checkpoint(checkpoint).shard_of
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()


def _report() -> bytes:
    expert = {"expert": "language", "tokens": 1, "samples": 1, "held_out_tokens": 1, "wanted_tokens": 1}
    linear = {"name": "a", "bits": 4, "group_size": 16, "method": "gptq"}
    settings = {"parts": {"decoder": "int4"}, "hessian": "routed", "quality": "default"}
    calibration = {"data": "d", "samples": 1, "experts": [expert]}
    report = {"settings": settings, "calibration": calibration, "size_bytes": 1, "linears": [linear]}
    return json.dumps(report).encode()


def _sentencepiece(models: Models) -> list[bytes]:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.trainer_spec.vocab_size = 261
    model.normalizer_spec.name, model.normalizer_spec.escape_whitespaces = "identity", True
    named = [(2, "<unk>"), (3, "<s>"), (3, "</s>"), *((6, f"<0x{byte:02X}>") for byte in range(256))]
    for kind, piece in [*named, (1, "\N{LOWER ONE EIGHTH BLOCK}a"), (1, "b")]:
        model.pieces.add(piece=piece, score=-float(len(model.pieces)), type=kind)
    return [model.SerializeToString()]


def _file(path: Callable[[Models], Path]) -> Callable[[Models], list[bytes]]:
    return lambda models: [path(models).read_bytes()]


TARGETS: dict[str, Target] = {
    "image": Target(_image, _pictures),
    "manifest": Target(_manifest, lambda models: [_unsigned(models.bundle)], is_json=True),
    "bundle": Target(_bundle, lambda models: [_unsigned(models.bundle)], lambda models: models.bundle, is_json=True),
    "graph": Target(_graph, lambda models: [path.read_bytes() for path in sorted(models.bundle.glob("*.onnx"))]),
    "reference": Target(
        _reference, _file(lambda models: models.bundle / "reference.npz"), lambda models: models.bundle
    ),
    "safetensors": Target(
        _in_checkpoint("model.safetensors"), _file(lambda models: models.checkpoint / "model.safetensors"),
        lambda models: models.checkpoint,
    ),
    "config": Target(
        _in_checkpoint("config.json"), _file(lambda models: models.checkpoint / "config.json"),
        lambda models: models.checkpoint, is_json=True,
    ),
    "gptq_config": Target(
        _in_checkpoint("config.json"), _file(lambda models: models.quantized / "config.json"),
        lambda models: models.quantized, is_json=True,
    ),
    "index": Target(
        _in_checkpoint("model.safetensors.index.json"),
        lambda models: [_index(models.checkpoint)],
        lambda models: models.checkpoint, is_json=True,
    ),
    "quantization_report": Target(
        _in_checkpoint("quantization_report.json"), lambda models: [_report()],
        lambda models: models.quantized, is_json=True,
    ),
    "tokenizer_json": Target(
        _tokenizer("tokenizer.json"), _file(lambda models: models.checkpoint / "tokenizer.json"), is_json=True
    ),
    "sentencepiece": Target(_tokenizer("tokenizer.model"), _sentencepiece),
    "messages": Target(_messages, _message_seeds, is_json=True),
    "rows": Target(_data("data.jsonl"), _rows),
    "refcoco": Target(_data("refs.jsonl"), _refcoco, is_json=True),
    "coco": Target(_data("refs.json"), _coco, is_json=True),
    "table": Target(_data("MMBench.tsv"), _table),
    "label": Target(_label, _labels, is_json=True),
    "state": Target(_state, _states),
    "predictions_tsv": Target(_predictions("answers.tsv"), lambda models: [b"index\tprediction\n1\ta\n2\tb\n"]),
    "predictions_jsonl": Target(_predictions("answers.jsonl"), lambda models: [b'{"index": "1", "prediction": "a"}\n']),
    "predictions_xlsx": Target(_predictions("answers.xlsx"), _sheet),
    "recipe": Target(_toml(load_config), _file(lambda models: DIGITS / "train.toml"), lambda models: DIGITS),
    "grid": Target(_toml(read_grid), _file(lambda models: DIGITS / "grid.toml")),
    "device": Target(
        _toml(lambda path: plan_device(str(path))),
        lambda models: [b'name = "d"\nkind = "rtx"\nmemory = "16GB"\nbandwidth_gb_s = 100\n'],
    ),
}  # fmt: skip


class Room:
    """A folder of its own for one target, made new for every input."""

    def __init__(self, name: str, models: Models, folder: Path) -> None:
        self.target = TARGETS[name]
        self._source = None if self.target.copied is None else self.target.copied(models)
        self._folder = folder

    def check(self, data: bytes) -> None:
        """Give the input to the target. Whatever it raises goes through."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for path in self._files():
            os.link(path, self._folder / path.name)
        self.target.check(data, self._folder)

    def _files(self) -> Iterator[Path]:
        return iter(()) if self._source is None else (path for path in self._source.iterdir() if path.is_file())
