"""Contract tests: the manifest comes back as it was written, and anything else in its place is one clear error."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmdeploy.bundle import hash_file, read_manifest, write_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.manifest import (
    MANIFEST_NAME,
    PROMPT_FORMAT_VERSION,
    CacheShape,
    ChatTemplate,
    EmbeddingInfo,
    FileEntry,
    GenerationDefaults,
    GraphInfo,
    ImageRecipe,
    Manifest,
    Piece,
    Provenance,
    StageVerdict,
    TensorInfo,
    TokenRules,
    Verification,
    format_of,
)

VISION = GraphInfo(
    "vision.onnx", "vision.data", (TensorInfo("x", "float32", (1, "seq", 8)),), (TensorInfo("y", "float16", ()),)
)
FILES = ["decoder_text.onnx", "decoder_text.data", "vision.onnx", "vision.data", "tokenizer.json"]
MANIFEST = Manifest(
    family="cogvlm",
    target="ort-int4",
    provider="cpu",
    context_tokens=128,
    image=ImageRecipe(56, (0.5, 0.4, 0.25), (0.25, 0.5, 1.0)),
    templates=(ChatTemplate("chät", (Piece("user"),), (Piece("text", '→ "q"\n\\ 问'), Piece("token", token_id=3))),),
    default_template="chät",
    tokens=TokenRules(1, 0, 0, (2, 5), rows_per_image=18, max_images=1),
    generation=GenerationDefaults(True, 0.6, None, 40),
    cache=CacheShape(2, 4, 4, "fp16", (1.0, 0.1)),
    graphs={"vision": VISION, "decoder_text": GraphInfo("decoder_text.onnx", "decoder_text.data", (), VISION.outputs)},
    embedding=EmbeddingInfo("embedding.bin", "int4", 320, 128, 32, 20480),
    has_tokenizer=True,
    precision={"vision": "int8"},
    group_sizes={"vision": 0},
    requested_group=128,
    kept_in_float=("decoder.layers.0.language.qkv",),
    memory_bytes={"decode": 12345678901},
    files={name: FileEntry(300, "ab" * 32) for name in FILES} | {"embedding.bin": FileEntry(23040, "cd" * 32)},
    made_by=Provenance("cd" * 32, {"torch": "2.0"}, "rtn", ("a note",)),
    verification=Verification(True, (StageVerdict("vision", "shipped", 1e-5, 3e-4, "y", True),), 1.0, 16, 16, "x86"),
)


def signed(folder: Path, data: Any) -> Path:
    """A manifest with this content and a hash that fits, as another version of vlmdeploy might write it."""
    return sealed(folder, json.dumps(data, indent=1)[:-2].encode() + b',\n "sha256": "')


def sealed(folder: Path, body: bytes) -> Path:
    """A manifest of these bytes and their hash."""
    (folder / MANIFEST_NAME).write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')
    return folder


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """The JSON of a good manifest, without its hash."""
    write_manifest(tmp_path, MANIFEST)
    content: dict[str, Any] = json.loads((tmp_path / MANIFEST_NAME).read_bytes())
    del content["sha256"]
    return content


@pytest.mark.parametrize("verification", [MANIFEST.verification, None])
def test_manifest_reads_back_as_written(tmp_path: Path, verification: Verification | None) -> None:
    write_manifest(tmp_path, replace(MANIFEST, verification=verification))
    assert read_manifest(tmp_path) == replace(MANIFEST, verification=verification)


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        write_manifest(tmp_path, MANIFEST)
        contents.append((tmp_path / MANIFEST_NAME).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path, bit: int) -> None:
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(BundleError, match="copy the bundle again"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("space", [b" ", b"\r", b"\t"])
def test_other_white_space_at_the_end_is_noticed(tmp_path: Path, space: bytes) -> None:
    """The closing newline was once compared after stripping: another blank in its place went unseen."""
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-1] + space)
    with pytest.raises(BundleError, match="copy the bundle again"):
        read_manifest(tmp_path)


def test_truncated_manifest_is_noticed_at_every_length(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / MANIFEST_NAME
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BundleError, match=r"truncated|altered"):
            read_manifest(tmp_path)


def test_longer_manifest_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    with (tmp_path / MANIFEST_NAME).open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(BundleError, match="copy the bundle again"):
        read_manifest(tmp_path)


def test_missing_folder_and_missing_manifest_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no such folder; expected a bundle"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=f"has no {MANIFEST_NAME}"):
        read_manifest(tmp_path)


SYSTEM = (Piece("system"), Piece("text", " "))
NEW_PROMPTS: list[tuple[Manifest, dict[str, Any]]] = [
    (replace(MANIFEST, templates=(replace(MANIFEST.templates[0], system=SYSTEM), *MANIFEST.templates[1:])), {
        "system": [{"kind": "system", "text": "", "token_id": -1}, {"kind": "text", "text": " ", "token_id": -1}]
    }),
    (replace(MANIFEST, image=replace(MANIFEST.image, resize="pad")), {}),
    (replace(MANIFEST, tokens=replace(MANIFEST.tokens, image_place="anywhere")), {}),
    (replace(MANIFEST, tokens=replace(MANIFEST.tokens, positions="index")), {}),
]  # fmt: skip


@pytest.mark.parametrize(("manifest", "written"), NEW_PROMPTS)
def test_what_earlier_readers_would_make_wrongly_is_format_3(
    tmp_path: Path, manifest: Manifest, written: dict[str, Any]
) -> None:
    assert format_of(MANIFEST) == MANIFEST.format_version == "1.3"
    assert format_of(manifest) == "3.0"
    whole = replace(manifest, format_version=format_of(manifest))
    write_manifest(tmp_path, whole)
    assert read_manifest(tmp_path) == whole
    template = json.loads((tmp_path / MANIFEST_NAME).read_text())["templates"][0]
    assert template.keys() == {"name", "past_turn", "last_turn", *written}
    assert {key: template[key] for key in written} == written


@pytest.mark.parametrize("version", ["4.0", "10.3"])
def test_newer_major_format_is_refused_before_anything_else(tmp_path: Path, version: str) -> None:
    with pytest.raises(BundleError, match=f"format {version} is newer than {PROMPT_FORMAT_VERSION}.*update vlmdeploy"):
        read_manifest(signed(tmp_path, {"format_version": version, "files": "what we cannot know"}))


@pytest.mark.parametrize("version", ["1", "one.two", "", None, 1, "1.x", "-1.0"])
def test_senseless_format_version_is_refused(tmp_path: Path, data: dict[str, Any], version: Any) -> None:
    with pytest.raises(BundleError, match=r"format_version is .*expected major.minor"):
        read_manifest(signed(tmp_path, data | {"format_version": version}))


def test_keys_of_a_newer_minor_format_are_ignored(tmp_path: Path, data: dict[str, Any]) -> None:
    data |= {"format_version": "1.7", "speculative": {"draft": 4}}
    data["image"]["crop"] = "none"
    data["graphs"]["vision"]["inputs"][0]["layout"] = "nchw"
    assert read_manifest(signed(tmp_path, data)) == replace(MANIFEST, format_version="1.7")


@pytest.mark.parametrize(
    "path",
    [
        ("family",), ("files",), ("image", "mean"), ("tokens", "stop_ids"), ("cache", "inv_freq"),
        ("graphs", "vision", "inputs", 0, "shape"), ("made_by", "quantization"), ("files", "vision.onnx", "sha256"),
        ("verification", "stages", 0, "tolerance"), ("templates", 0, "last_turn", 1, "kind"),
    ],
    ids=lambda path: path[-1],
)  # fmt: skip
def test_missing_key_is_named_with_its_place(tmp_path: Path, data: dict[str, Any], path: tuple[Any, ...]) -> None:
    inner(data, path).pop(path[-1])
    place = ".*".join(str(step) for step in path[:-1])
    with pytest.raises(BundleError, match=rf'{MANIFEST_NAME}.*key "{place}.*{path[-1]}" is missing'):
        read_manifest(signed(tmp_path, data))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("family",), 7, "expected a string"),
        (("context_tokens",), "128", "expected a whole number"),
        (("context_tokens",), True, "expected a whole number"),
        (("context_tokens",), 128.0, "expected a whole number"),
        (("has_tokenizer",), 1, "expected true or false"),
        (("provider",), "tpu", "expected 'cpu' or 'cuda'"),
        (("image",), [], "expected an object"),
        (("image", "mean"), [0.5, 0.5], "expected 3 items"),
        (("image", "std", 1), "0.5", "expected a number"),
        (("tokens", "stop_ids"), 2, "expected a list"),
        (("tokens", "stop_ids", 0), None, "expected a whole number"),
        (("generation", "top_p"), "0.9", "expected a number"),
        (("graphs",), [], "expected an object"),
        (("graphs", "vision", "inputs", 0, "shape", 1), 1.5, "expected a whole number or a string"),
        (("files", "vision.onnx", "bytes"), "3", "expected a whole number"),
        (("verification",), "passed", "expected an object"),
        (("templates", 0, "past_turn", 0, "kind"), "tool", "expected 'text' or 'user'"),
    ],
)
def test_wrong_type_is_named_with_its_place(
    tmp_path: Path, data: dict[str, Any], path: tuple[Any, ...], value: Any, expected: str
) -> None:
    inner(data, path)[path[-1]] = value
    place = ".*".join(str(step) for step in path)
    with pytest.raises(BundleError, match=rf'{MANIFEST_NAME}.*"{place}" is .*{expected}') as caught:
        read_manifest(signed(tmp_path, data))
    assert "\n" not in str(caught.value)


def inner(data: Any, path: tuple[Any, ...]) -> Any:
    """The object or list that holds the last step of the path."""
    for step in path[:-1]:
        data = data[step]
    return data


def test_whole_number_is_read_as_a_float(tmp_path: Path, data: dict[str, Any]) -> None:
    data["image"]["std"] = [1, 1, 1]
    std = read_manifest(signed(tmp_path, data)).image.std
    assert std == (1.0, 1.0, 1.0)
    assert all(isinstance(value, float) for value in std)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"sha256": "'])
def test_other_files_in_place_of_a_manifest_are_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match="truncated"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "body", [b'{, "sha256": "', b'{"a": ' + b"[" * 100_000 + b', "sha256": "', b'{"\xff": "sha256": "']
)
def test_manifest_that_is_not_json_is_an_error_though_its_hash_fits(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(BundleError, match="not JSON"):
        read_manifest(sealed(tmp_path, body))


# What a stranger may not write, though every type is right

ESCAPES = [
    "../vision.onnx", "/etc/passwd", "a/b", "engines/../x", "engines/a/b", ".", "..", "", ".hidden", "a\0b", "a\nb",
    "manifest.json", "engines", "engines/", "n" * 256,
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_file_names_are_plain(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    data["files"][name] = data["files"]["vision.onnx"]
    with pytest.raises(BundleError, match=r'"files" is .*expected plain file names'):
        read_manifest(signed(tmp_path, data))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("graphs", "vision", "file"), "graphs.vision.file"),
        (("graphs", "vision", "data_file"), "graphs.vision.data_file"),
        (("embedding", "file"), "embedding.file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["unlisted.bin", "../vision.onnx", "/etc/passwd"])
def test_every_file_that_is_read_is_listed(
    tmp_path: Path, data: dict[str, Any], path: tuple[str, ...], key: str, name: str
) -> None:
    """A file that the manifest did not list was read without being hashed."""
    inner(data, path)[path[-1]] = name
    with pytest.raises(BundleError, match=rf'"{key}" is .*expected a file that "files" lists'):
        read_manifest(signed(tmp_path, data))


def test_tokenizer_is_listed(tmp_path: Path, data: dict[str, Any]) -> None:
    del data["files"]["tokenizer.json"]
    with pytest.raises(BundleError, match=r'"has_tokenizer" is .tokenizer\.json., expected a file that "files" lists'):
        read_manifest(signed(tmp_path, data))


ENGINE = {
    "file": "engines/vision.engine", "graph": "vision", "part": 0, "layers": [0, 0], "library": "tensorrt",
    "version": "11.4", "compute_capabilities": [], "chunk_rows": 8, "logit_rows": 4, "context_tokens": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plugin": {"packing": 1, "library": "engines/p.so"}}, '"plugin" is .ort-int4., expected a routed decoder'),
        ({"plugin": {"packing": 1}, "target": "trt-int4"}, '"plugin" is .trt-int4., expected a routed decoder for trt'),
        ({"engines": {"vision": ENGINE}}, r'"engines" is .*expected none for ort-int4'),
        ({"engines": {"v": ENGINE | {"file": "vision.onnx"}}, "target": "trt-int4"}, r"engines\.v\.file.*engines/NAME"),
        (
            {"engines": {"v": ENGINE | {"graph": "x"}}, "target": "trt-int4"},
            r"engines\.v\.graph.*a graph of the bundle",
        ),
        ({"engines": {"v": ENGINE | {"layers": [0, 9]}}, "target": "trt-int4"}, r"engines\.v\.layers.*layers of the"),
        ({"engines": {"v": ENGINE | {"chunk_rows": 0}}, "target": "trt-int4"}, r"chunk_rows.*a number from 1 to"),
        ({"target": "cpu"}, '"target" is .cpu., expected ort-'),
    ],
)
def test_native_code_is_for_targets_that_take_it(
    tmp_path: Path, data: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    """The target was looked at only after the library of the plugin had been loaded."""
    entry = data["files"]["vision.onnx"]
    data["files"] |= {"engines/p.so": entry, "engines/vision.engine": entry}
    with pytest.raises(BundleError, match=expected):
        read_manifest(signed(tmp_path, data | changes))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("context_tokens",), 0), (("context_tokens",), 10**400),
        (("image", "size_px"), 10**9), (("image", "std", 0), 0),
        (("image", "mean", 0), 1e308), (("tokens", "rows_per_image"), 129), (("tokens", "max_images"), 10**6),
        (("tokens", "bos_id"), 320), (("tokens", "placeholder_id"), -1), (("templates",), []),
        (("embedding", "vocab_size"), 321), (("embedding", "hidden"), 0), (("embedding", "group_size"), 0),
        (("embedding", "group_size"), 33),
        (("embedding", "scales_offset"), 20478), (("embedding", "scales_offset"), -2),
        (("embedding", "scales_offset"), 20482), (("embedding", "dtype"), "fp32"), (("cache", "num_layers"), 10**5),
        (("cache", "kv_heads"), 100), (("cache", "dtype"), "float64"), (("cache", "inv_freq"), [1.0]),
        (("cache", "inv_freq", 0), float("nan")), (("files", "vision.onnx", "bytes"), -1),
        (("files", "vision.onnx", "sha256"), "../x"), (("graphs", "vision", "inputs", 0, "shape"), [-1]),
        (("graphs", "vision", "inputs", 0, "shape"), [1] * 9), (("memory_bytes", "decode"), -1),
        (("verification", "stages"), []), (("verification", "stages", 0, "tolerance"), 0),
    ],
    ids=lambda value: "-".join(map(str, value))[:40] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_numbers_are_bounded_by_the_files(
    tmp_path: Path, data: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    """Numbers of a stranger decided how much memory was asked for, or divided by zero."""
    inner(data, path)[path[-1]] = value
    with pytest.raises(BundleError, match=rf"{MANIFEST_NAME}: .*expected "):
        read_manifest(signed(tmp_path, data))


@pytest.mark.parametrize("graphs", [{"vision"}, {"vision", "decoder_text", "decoder"}, {"decoder_text", "../x"}])
def test_graphs_are_those_that_we_know(tmp_path: Path, data: dict[str, Any], graphs: set[str]) -> None:
    data["graphs"] = {name: data["graphs"].get(name, data["graphs"]["vision"]) for name in graphs}
    with pytest.raises(BundleError, match=r'"graphs" is '):
        read_manifest(signed(tmp_path, data))


def test_two_graphs_do_not_share_a_file(tmp_path: Path, data: dict[str, Any]) -> None:
    data["graphs"]["vision"]["data_file"] = "decoder_text.data"
    with pytest.raises(BundleError, match="expected a file of its own for each graph"):
        read_manifest(signed(tmp_path, data))


def test_endless_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"has 1099\.5 GB, at most 16\.8 MB are read"):
        read_manifest(tmp_path)


def test_manifest_that_is_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(BundleError, match="is a FIFO or pipe, expected a manifest"):
        read_manifest(tmp_path)


def test_template_is_found_by_name_or_default() -> None:
    assert MANIFEST.template(None) is MANIFEST.template("chät") is MANIFEST.templates[0]
    with pytest.raises(BundleError, match='template "vqa" is not in this bundle; it has: chät'):
        MANIFEST.template("vqa")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_covers_the_whole_file(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == FileEntry(size, hashlib.sha256(content).hexdigest())
