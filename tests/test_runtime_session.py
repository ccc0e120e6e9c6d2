"""Contract tests: an opened bundle answers without torch, refuses what its model cannot take, and is opened only when
every byte of it is as it was written. Agreement: streamed text, multi-turn prompts and phase residency change nothing.
"""

import base64
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import vlmdeploy
from tests.graph_edits import graph_of
from tests.tiny_bundle import (
    content_of,
    edit_manifest,
    flip_byte,
    picture,
    run_process,
    sign_again,
    without,
)
from tests.tiny_checkpoint import TinyCheckpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BackendError, BundleError, DataError, PromptError
from vlmdeploy.manifest import MANIFEST_NAME
from vlmdeploy.runtime.backends.ort import OrtBackend
from vlmdeploy.runtime.image import preprocess
from vlmdeploy.runtime.sampling import SamplingOptions
from vlmdeploy.runtime.session import Session

FILES = [
    "decoder_text.data", "decoder_text.onnx", "decoder_vision.data", "decoder_vision.onnx", "embedding.bin",
    "reference.npz", "tokenizer.json", "vision.data", "vision.onnx",
]  # fmt: skip
ROWS = 18  # of an image
CONTEXT = 128
TORCH_FREE = (
    "torch", "onnx", "safetensors", "sentencepiece", "vlmdeploy.model", "vlmdeploy.families", "vlmdeploy.export",
    "vlmdeploy.quant", "vlmdeploy.calib", "vlmdeploy.train",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_hash_cache")


@pytest.fixture(scope="module")
def bundle(answering_bundle: Path) -> Path:
    return answering_bundle


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return vlmdeploy.open(bundle, threads=1)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def user(text: str, *images: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def pixels_of(session: Session, seed: int = 0) -> NDArray[np.float32]:
    return preprocess(picture(seed), session.manifest.image)[None]


def prompt(session: Session, text: str, with_image: bool) -> NDArray[np.int64]:
    """BOS, the places of the image, the text as the tokenizer writes it."""
    tokens = session.manifest.tokens
    places = [tokens.placeholder_id] * (tokens.rows_per_image if with_image else 0)
    return np.array([tokens.bos_id, *places, *session.tokenizer.encode(text)])


# Without torch


def test_bundle_answers_where_torch_cannot_be_imported(session: Session, bundle: Path, tmp_path: Path) -> None:
    """In a fresh process in which nothing of the toolchain can be imported: text, ids and logits."""
    picture().save(tmp_path / "a.png")
    script = f"""{without(*TORCH_FREE)}
import json, numpy as np, vlmdeploy
session = vlmdeploy.open({str(bundle)!r}, threads=1)
content = [{{"type": "image", "image": {str(tmp_path / "a.png")!r}}}, {{"type": "text", "text": "What?"}}]
pieces = list(session.generate([{{"role": "user", "content": content}}], max_new_tokens=12))
ids = session.generate_ids(np.array([1, 70, 71]), max_new_tokens=5).tolist()
best = session.logits(np.array([1, 70, 71])).argmax(1).tolist()
blocked = [name for name in {TORCH_FREE!r} if name in sys.modules]
print(json.dumps([pieces, ids, best, blocked]))
"""
    done = run_process("-c", script)
    assert done.returncode == 0, done.stderr
    pieces, ids, best, blocked = json.loads(done.stdout)
    assert blocked == []
    assert "".join(pieces) == "".join(session.generate([user("What?", picture())], max_new_tokens=12))
    assert ids == session.generate_ids(np.array([1, 70, 71]), max_new_tokens=5).tolist()
    assert best == session.logits(np.array([1, 70, 71])).argmax(1).tolist()


# Answers


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text_only"])
def test_streamed_text_is_the_text_of_the_greedy_ids(session: Session, with_image: bool) -> None:
    ids = prompt(session, "Question: Why? Answer:", with_image)
    new_ids = session.generate_ids(ids, pixels_of(session) if with_image else None, 20)
    pieces = list(session.generate([user("Why?", *([picture()] if with_image else []))], max_new_tokens=20))
    stop_ids = session.manifest.tokens.stop_ids
    assert "".join(pieces) == session.tokenizer.decode(token for token in new_ids if token not in stop_ids)
    assert len(pieces) > 1 and all(pieces), "as they become certain, none of them empty"


def test_picture_may_come_as_path_bytes_pillow_or_data_url(session: Session, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    url_part = {"type": "image_url", "image_url": {"url": url}}
    by_url = {"role": "user", "content": [url_part, {"type": "text", "text": "Why?"}]}
    sources = [picture(), tmp_path / "a.png", str(tmp_path / "a.png"), content, io.BytesIO(content).getvalue()]
    messages = [*(user("Why?", source) for source in sources), by_url]
    answers = {"".join(session.generate([message], max_new_tokens=8)) for message in messages}
    assert len(answers) == 1


def test_no_stop_strings_may_be_none_as_in_other_clients(session: Session) -> None:
    assert "".join(session.generate([user("Why?")], 4, stop=None)) == "".join(session.generate([user("Why?")], 4))
    with pytest.raises(PromptError, match="option stop is 7, expected a string, a list of strings or None"):
        session.generate([user("Why?")], stop=7)  # type: ignore[arg-type]


def test_text_that_no_context_holds_is_refused_before_it_is_tokenized(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmdeploy.runtime.chat.Tokenizer.encode", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(PromptError, match=r"the text has 16,385 bytes, at most 16,384 bytes fit into a context of 128"):
        session.generate([user("a" * 16_385)])


@pytest.mark.parametrize("values", [[10**400], [1.5], [], [[1, 2], [3]], "text", None, [None], {}, np.zeros(2, bool)])
def test_ids_and_pixels_of_any_kind_are_one_prompt_error(session: Session, values: Any) -> None:
    with pytest.raises(PromptError):
        session.generate_ids(values)
    if values is not None:
        with pytest.raises(PromptError):
            session.logits(np.array([1, 2]), images=values)


def edit_graph(bundle: Path, name: str, edit: Callable[[Any], None]) -> None:
    model = graph_of(bundle, name)
    edit(model)
    (bundle / f"{name}.onnx").write_bytes(model.SerializeToString())
    sign_again(bundle)


def test_run_that_the_engine_refuses_is_a_backend_error(copy: Path) -> None:
    """Errors of onnxruntime are of classes that it keeps for itself."""

    def edit(model: Any) -> None:
        pixels = next(value for value in model.graph.input if value.name == "pixels")
        pixels.type.tensor_type.shape.dim[2].dim_value += 1

    edit_graph(copy, "vision", edit)
    with (
        vlmdeploy.open(copy, threads=1) as opened,
        pytest.raises(BackendError, match=r"vision\.onnx: onnxruntime cannot"),
    ):
        list(opened.generate([user("Why?", picture())]))


def test_outputs_of_another_shape_are_a_backend_error(copy: Path) -> None:
    """Numpy failed on them, with a traceback."""

    def edit(model: Any) -> None:
        rows = next(value for value in model.graph.output if value.name == "rows")
        for node in model.graph.node:
            node.output[:] = ["rows.whole" if name == "rows" else name for name in node.output]
        transpose = type(model.graph.node[0])(op_type="Transpose", input=["rows.whole"], output=["rows"])
        model.graph.node.append(transpose)
        del rows.type.tensor_type.shape.dim[:]
        rows.type.tensor_type.ClearField("shape")

    edit_graph(copy, "vision", edit)
    with (
        vlmdeploy.open(copy, threads=1) as opened,
        pytest.raises(BackendError, match=r"vision\.onnx: rows is float32 \["),
    ):
        list(opened.generate([user("Why?", picture())]))


def test_picture_changes_the_answer(session: Session) -> None:
    seeds = range(3)
    logits = [session.logits(prompt(session, "Why?", True), pixels_of(session, seed))[-1] for seed in seeds]
    assert np.abs(logits[0] - logits[1]).max() > 0.01 < np.abs(logits[1] - logits[2]).max()


def test_later_turn_keeps_the_image_of_the_first(session: Session) -> None:
    """The image's rows stay behind BOS, before the first question, whatever was said since."""
    history = [user("What?", picture()), assistant("A dog."), user("Where?")]
    answer = session.answer(history, SamplingOptions(max_new_tokens=10))
    text = "Question: What? Answer: A dog.\nQuestion: Where? Answer:"
    ids = prompt(session, text, True)
    assert answer.prompt_tokens == len(ids)
    assert list(answer.ids) == session.generate_ids(ids, pixels_of(session), 10).tolist()


def test_image_of_a_later_turn_stands_behind_bos_too(session: Session) -> None:
    history = [user("What?"), assistant("A dog."), user("Where?", picture())]
    same = [user("What?", picture()), assistant("A dog."), user("Where?")]
    options = SamplingOptions(max_new_tokens=10)
    assert session.answer(history, options).ids == session.answer(same, options).ids


def test_one_session_answers_many_prompts_independently(session: Session, bundle: Path) -> None:
    """No trace of an earlier prompt, its picture or its cache stays."""
    first, second = [user("What?", picture(1))], [user("And this one?", picture(2))]
    options = SamplingOptions(max_new_tokens=10)
    fresh = [vlmdeploy.open(bundle, threads=1).answer(messages, options).ids for messages in (first, second)]
    assert [session.answer(messages, options).ids for messages in (first, second, first, second)] == fresh * 2


def test_two_answers_may_be_streamed_at_once(session: Session) -> None:
    alone = [list(session.generate([user(text)], max_new_tokens=10)) for text in ("What?", "Where to?")]
    streams = [session.generate([user(text)], max_new_tokens=10) for text in ("What?", "Where to?")]
    together: list[list[str]] = [[], []]
    for index in range(20):
        if (piece := next(streams[index % 2], None)) is not None:
            together[index % 2].append(piece)
    assert together == alone


def test_same_picture_is_encoded_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = OrtBackend.encode_images

    def count(self: OrtBackend, pixels: Any) -> Any:
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(OrtBackend, "encode_images", count)
    for text, seed in (("What?", 11), ("Where?", 11), ("What?", 12)):
        session.answer([user(text, picture(seed))], SamplingOptions(max_new_tokens=2))
    assert encoded == [1, 1]


def test_answer_ends_before_a_stop_string(session: Session) -> None:
    whole = "".join(session.generate([user("What?")], max_new_tokens=20))
    stop = whole[6:8]
    cut = "".join(session.generate([user("What?")], max_new_tokens=20, stop=[stop, "never said"]))
    assert cut == whole[: whole.index(stop)] and len(cut) < len(whole)
    assert cut == "".join(session.generate([user("What?")], max_new_tokens=20, stop=stop)), "one may be given alone"


def test_max_new_tokens_bounds_the_answer(session: Session) -> None:
    for count in (1, 2, 7):
        answer = session.answer([user("What?")], SamplingOptions(max_new_tokens=count))
        assert answer.new_tokens == len(answer.ids) == count
    longest = session.generate_ids(np.array([1, 70]), max_new_tokens=7).tolist()
    assert session.generate_ids(np.array([1, 70]), max_new_tokens=3).tolist() == longest[:3]


def test_seed_makes_a_drawn_answer_repeatable(session: Session) -> None:
    def drawn(seed: int) -> str:
        return "".join(session.generate([user("What?")], max_new_tokens=12, temperature=1.5, top_p=0.95, seed=seed))

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1
    greedy = "".join(session.generate([user("What?")], max_new_tokens=12))
    assert greedy == "".join(session.generate([user("What?")], max_new_tokens=12, temperature=2.0, top_k=1, seed=0))


def test_another_template_makes_another_prompt(session: Session) -> None:
    options = SamplingOptions(max_new_tokens=1)
    lengths = {name: session.answer([user("Why?")], options, name).prompt_tokens for name in ("chat", "vqa", "base")}
    assert lengths == {
        "chat": len(prompt(session, "Question: Why? Answer:", False)),
        "vqa": len(prompt(session, "Question: Why? Short answer:", False)),
        "base": len(prompt(session, "Why?", False)),
    }
    with pytest.raises(BundleError, match='template "poem" is not in this bundle; it has: '):
        session.generate([user("Why?")], template="poem")


def test_answer_reports_its_phases(session: Session) -> None:
    answer = session.answer([user("What?", picture(21))], SamplingOptions(max_new_tokens=4))
    assert set(answer.timings_ms) == {"preprocess", "vision", "prefill", "decode_per_token"}
    assert all(milliseconds > 0 for milliseconds in answer.timings_ms.values())


def test_phase_residency_gives_equal_answers_and_frees_the_prompts_graphs(session: Session, bundle: Path) -> None:
    small = vlmdeploy.open(bundle, threads=1, residency="phase")
    dropped: list[str] = []
    backend = small.backend
    assert isinstance(backend, OrtBackend)
    drop = backend.drop
    backend.drop = lambda graph: (dropped.append(graph), drop(graph))[1]  # type: ignore[func-returns-value, method-assign]
    options = SamplingOptions(max_new_tokens=8)
    for messages in ([user("What?", picture(1))], [user("And?", picture(2))], [user("Text.")]):
        assert small.answer(messages, options).ids == session.answer(messages, options).ids
    assert set(dropped) == {"vision", "decoder_vision", "decoder_text"}, "the text decoder while a picture is encoded"
    ids = prompt(session, "Why?", True)
    np.testing.assert_array_equal(small.logits(ids, pixels_of(session)), session.logits(ids, pixels_of(session)))


@pytest.mark.parametrize("threads", [None, 2])
def test_number_of_threads_changes_nothing_that_matters(session: Session, bundle: Path, threads: int | None) -> None:
    ids = prompt(session, "Why?", True)
    other = vlmdeploy.open(bundle, threads=threads).logits(ids, pixels_of(session))
    np.testing.assert_allclose(other, session.logits(ids, pixels_of(session)), atol=1e-4)


# Prompts that the model cannot take


IDS = np.array([1, *[0] * ROWS, 70, 71])
PIXELS = TinyCheckpoint().pixels()


@pytest.mark.parametrize(("ids", "images", "message"), [
    (np.delete(IDS, 1), PIXELS, r"ids\[1:19\] must be 18 times the placeholder 0, found it 17 times"),
    (IDS[:10], PIXELS, "found it 9 times in 10 ids"),
    (np.array([1, 70, 71]), PIXELS, "found it 0 times"),
    (IDS, np.concatenate((PIXELS, PIXELS)), "2 images were given, this model takes 1"),
    (IDS, PIXELS[0], r"images is \[3, 8, 8\], expected \[images, 3, 8, 8\]"),
    (IDS, PIXELS[..., :7], r"images is \[1, 3, 8, 7\]"),
    (np.array([1, 259]), None, r"input_ids holds 1\.\.259, expected 0\.\.258"),
    (np.array([1, -1]), None, r"input_ids holds -1\.\.1"),
    (np.array([], np.int64), None, r"input_ids is int64 \[0\]"),
    (np.array([[1, 5]]), None, r"input_ids is int64 \[1, 2\], expected int64 \[seq\]"),
    (np.array([1.0, 5.0]), None, r"input_ids is float64 \[2\]"),
    (np.ones(CONTEXT, np.int64), None, "the prompt has 128 tokens .* the context holds 128: shorten the text"),
])  # fmt: skip
def test_ids_that_do_not_fit_say_what_was_found(session: Session, ids: Any, images: Any, message: str) -> None:
    for call in (session.generate_ids, session.logits):
        with pytest.raises(PromptError, match=message):
            call(ids, images)


def test_prompt_of_placeholders_without_an_image_is_text(session: Session) -> None:
    assert np.isfinite(session.logits(IDS)).all()


def test_prompt_that_just_fits_gets_one_token(session: Session) -> None:
    ids = np.full(CONTEXT - 1, 70)
    assert len(session.generate_ids(ids, max_new_tokens=10)) == 1
    assert len(session.generate_ids(ids[:-3], max_new_tokens=10)) == 4
    assert session.logits(ids).shape == (CONTEXT - 1, 259)


@pytest.mark.parametrize(("messages", "options", "error", "message"), [
    ([user("x" * 200)], {}, PromptError, "the prompt has 2.. tokens .* the context holds 128"),
    ([user("a", picture(), picture())], {}, PromptError, "an image was given to a second image slot"),
    ([], {}, PromptError, "the list of messages is empty"),
    ([user("Why?", "nowhere.png")], {}, DataError, r"nowhere\.png: no such file"),
    ([user("Why?", b"text")], {}, DataError, "not a picture"),
    ([user("Why?")], {"max_new_tokens": 0}, PromptError, "max_new_tokens is 0"),
    ([user("Why?")], {"temperature": -1.0}, PromptError, r"temperature is -1\.0"),
    ([user("Why?")], {"stop": [""]}, PromptError, "stop is "),
])  # fmt: skip
def test_messages_and_options_are_checked_before_the_first_piece(
    session: Session, messages: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        session.generate(messages, **options)


# Bundles that are not as they were written


def test_bundle_holds_the_files_that_these_tests_know(bundle: Path) -> None:
    assert sorted(content_of(bundle)) == sorted([*FILES, MANIFEST_NAME])
    assert sorted(read_manifest(bundle).files) == FILES


@pytest.mark.parametrize("place", [0, None, -1])
@pytest.mark.parametrize("file", FILES)
def test_flipped_bit_in_any_file_is_found(copy: Path, file: str, place: int | None) -> None:
    flip_byte(copy / file, place)
    with pytest.raises(
        BundleError, match=rf"bundle/{file}: altered, its SHA-256 is not the manifest's; copy the bundle"
    ):
        vlmdeploy.open(copy, check="full")


@pytest.mark.parametrize("file", FILES)
def test_change_after_the_first_opening_is_found(copy: Path, file: str) -> None:
    """The second opening trusts the status of the files, and sees that one of them was written to."""
    vlmdeploy.open(copy)
    flip_byte(copy / file)
    status = (copy / file).stat()
    os.utime(copy / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    with pytest.raises(BundleError, match=f"{file}: altered"):
        vlmdeploy.open(copy)


def test_change_that_hides_behind_its_old_time_is_noticed(copy: Path) -> None:
    """Somebody flips a bit and sets the old time again: only a full check saw that."""
    vlmdeploy.open(copy)
    status = (copy / "vision.data").stat()
    flip_byte(copy / "vision.data")
    os.utime(copy / "vision.data", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=r"vision\.data: altered"):
        vlmdeploy.open(copy)


def test_full_check_trusts_no_remembered_hash(copy: Path, own_hash_cache: Path) -> None:
    vlmdeploy.open(copy)
    flip_byte(copy / "vision.data")
    known = json.loads(own_hash_cache.read_text())
    status = (copy / "vision.data").stat()
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known[":".join(map(str, (copy / "vision.data", *stamp)))] = read_manifest(copy).files["vision.data"].sha256
    own_hash_cache.write_text(json.dumps(known))
    vlmdeploy.open(copy)
    with pytest.raises(BundleError, match=r"vision\.data: altered"):
        vlmdeploy.open(copy, check="full")


@pytest.mark.parametrize("file", ["vision.data", "vision.onnx", "decoder_text.data", "decoder_text.onnx"])
def test_file_that_changes_after_the_bundle_was_opened_is_noticed(copy: Path, file: str) -> None:
    """Graphs are loaded on first use, long after their files were hashed."""
    session = vlmdeploy.open(copy, threads=1)
    status = (copy / file).stat()
    flip_byte(copy / file)
    os.utime(copy / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=rf"{file}: altered"):
        session.backend.warm_up(list(session.manifest.graphs))


def test_file_replaced_by_an_equal_one_is_hashed_again_and_used(copy: Path, tmp_path: Path) -> None:
    session = vlmdeploy.open(copy, threads=1)
    for file in FILES:
        shutil.copyfile(copy / file, tmp_path / "aside")
        (tmp_path / "aside").replace(copy / file)
    session.backend.warm_up(list(session.manifest.graphs))


@pytest.mark.parametrize("file", [*FILES, MANIFEST_NAME])
def test_missing_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(
        BundleError,
        match=f"has no {file}" if file == MANIFEST_NAME else f"{file}: no such file",
    ):
        vlmdeploy.open(copy)


@pytest.mark.parametrize("file", FILES)
def test_file_of_another_size_is_named(copy: Path, file: str) -> None:
    path = copy / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{file}: \d+ bytes, the manifest says \d+; copy the bundle again"):
        vlmdeploy.open(copy)


def test_bundle_of_a_newer_minor_version_is_opened(copy: Path) -> None:
    edit_manifest(copy, format_version="1.7")
    assert len(vlmdeploy.open(copy, threads=1).generate_ids(np.array([1, 70]), max_new_tokens=2)) == 2


def test_graph_that_the_engine_cannot_load_is_a_backend_error(copy: Path) -> None:
    model = graph_of(copy, "decoder_text")
    model.graph.node[0].input[0] = "nowhere"
    (copy / "decoder_text.onnx").write_bytes(model.SerializeToString())
    sign_again(copy)
    opened = vlmdeploy.open(copy)
    with pytest.raises(BackendError, match=r"decoder_text\.onnx: onnxruntime cannot load it"):
        opened.generate_ids(np.array([1, 70]))


def test_tokenizer_that_cannot_be_read_is_a_bundle_error(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    sign_again(copy)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a valid tokenizer\.json"):
        vlmdeploy.open(copy)


@pytest.mark.parametrize(("options", "message"), [
    ({"check": "never"}, 'check is \'never\', expected "auto" or "full"'),
    ({"residency": "disk"}, 'residency is \'disk\', expected "all" or "phase"'),
    ({"provider": "cuda"}, "exported for provider cpu, asked for cuda: export again with --provider cuda"),
])  # fmt: skip
def test_senseless_option_is_an_error(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((BundleError, BackendError), match=message):
        vlmdeploy.open(bundle, **options)


# The remembered hashes


def test_hashes_are_remembered_in_the_users_cache(copy: Path, own_hash_cache: Path) -> None:
    vlmdeploy.open(copy)
    remembered = json.loads(own_hash_cache.read_text())
    assert len(remembered) == len(FILES) and all(str(copy) in key for key in remembered)
    assert [path.name for path in own_hash_cache.parent.iterdir()] == ["hashes.json"]


def test_second_opening_hashes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlmdeploy.open(copy)
    monkeypatch.setattr("vlmdeploy.runtime.integrity.hash_stream", lambda file: pytest.fail(f"{file} is hashed again"))
    vlmdeploy.open(copy)


def test_hash_of_a_file_that_may_still_change_is_not_remembered(
    copy: Path, own_hash_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock a second change leaves every time as it is."""
    monkeypatch.setattr("vlmdeploy.runtime.integrity.SETTLED_NS", 3600 * 10**9)
    vlmdeploy.open(copy)
    assert not own_hash_cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00"])
def test_damaged_cache_is_ignored(copy: Path, own_hash_cache: Path, content: str) -> None:
    own_hash_cache.parent.mkdir(parents=True)
    own_hash_cache.write_text(content)
    vlmdeploy.open(copy)
    assert len(json.loads(own_hash_cache.read_text())) == len(FILES)


def test_cache_that_cannot_be_written_only_warns(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    with caplog.at_level(logging.WARNING):
        assert vlmdeploy.open(copy)
    assert "cannot be written" in caplog.text and "hashed at every open" in caplog.text


def test_logits_of_the_last_positions_equal_those_of_all(session: Session) -> None:
    ids = np.array([session.manifest.tokens.bos_id, 5, 9, 30, 7])
    assert np.array_equal(session.logits(ids, last=2), session.logits(ids)[-2:])
