"""Agreement tests of batches: prompts with and without pictures, side by side, answer as each does alone; in ONNX
Runtime and through the TensorRT backend on a fake device, whose plans run the same graphs."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_tensorrt import FakeDevice, fake_library, open_fake, write_fake_engines
from tests.tiny_bundle import export, picture, write_text_checkpoint
from tests.tiny_checkpoint import TinyCheckpoint
from vlmdeploy.bench.memory_use import device_memory
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BackendError, PromptError
from vlmdeploy.export.engines.parts import EnginePart
from vlmdeploy.manifest import PluginUse
from vlmdeploy.runtime.backends.lanes import Call, Lanes
from vlmdeploy.runtime.backends.ort import OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend, needed_bytes
from vlmdeploy.runtime.generate import GenerateLoop, Request, make_prompt, prefill_steps
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.runtime.sampling import SamplingOptions
from vlmdeploy.runtime.session import Session, open_bundle

Question = tuple[np.ndarray, np.ndarray | None]
LAYERS, CHUNK_ROWS, LOGIT_ROWS, BATCH = 3, 7, 4, 3
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("batch") / "ckpt", seed=5, layers=LAYERS, mlp=128)


@pytest.fixture(scope="module")
def routed(ckpt: Path) -> Path:
    """A verified bundle with one routed decoder and no engines. Shared: do not change it."""
    return export(ckpt, ckpt.parent / "routed", "trt-int4", group=32, routed_plugin="on")


@pytest.fixture(scope="module")
def segmented(ckpt: Path) -> Path:
    """The same model as two graphs of equal expert."""
    return export(ckpt, ckpt.parent / "segmented", "trt-int4", group=32)


@pytest.fixture
def built(routed: Path, tmp_path: Path) -> Path:
    """The routed bundle with fake plans for batches, its decoder in two parts."""
    folder = shutil.copytree(routed, tmp_path / "bundle")
    parts = [EnginePart("vision", 0, (0, 0), 0, is_whole=True)]
    parts += [EnginePart("decoder", index, layers, 0, is_whole=False) for index, layers in enumerate([(0, 2), (2, 3)])]
    write_fake_engines(folder, parts, CHUNK_ROWS, LOGIT_ROWS, BATCH)
    return folder


def questions() -> list[Question]:
    """Short and long, with and without a picture, two pictures among them."""
    tiny = TinyCheckpoint("cogvlm", vocab=259)
    pictures = tiny.pixels(2)
    texts: list[tuple[list[int], int | None]] = [([5], 0), (list(range(30, 62)), None), ([9, 8], None), ([7] * 11, 1)]
    return [
        (np.array(tiny.prompt(text, which is not None)), None if which is None else pictures[which : which + 1])
        for text, which in texts
    ]


def lists(answers: Any) -> list[list[int]]:
    return [answer.tolist() for answer in answers]


def alone(session: Session) -> list[list[int]]:
    return lists(session.generate_ids(ids, pixels, NEW_TOKENS) for ids, pixels in questions())


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 256])
def test_batch_answers_as_each_prompt_alone(routed: Path, chunk_rows: int) -> None:
    with open_bundle(routed, provider="cpu", threads=1) as session:
        session.backend.chunk_rows = chunk_rows
        assert lists(session.generate_ids_batch(questions(), NEW_TOKENS)) == alone(session)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (8, 1), (8, 8, 8), (127, 1, 15), (126, 127), (14,)])
def test_prompts_of_odd_lengths_answer_as_each_alone(built: Path, segmented: Path, lengths: tuple[int, ...]) -> None:
    """One token, whole calls and one row more, as long as the context of 128 allows."""
    prompts = [(np.arange(length) * (7 + length) % 250 + 3, None) for length in lengths]
    session, _ = open_fake(built)
    with open_bundle(segmented, provider="cpu", threads=1) as reference:
        for new_tokens in (1, 4):
            expected = [reference.generate_ids(ids, None, new_tokens) for ids, _ in prompts]
            assert lists(session.generate_ids_batch(prompts, new_tokens)) == lists(expected)


def test_stop_id_ends_the_answers_that_hold_it_and_no_others(routed: Path) -> None:
    """One of the answers' own tokens is declared a stop id."""
    with open_bundle(routed, provider="cpu", threads=1) as session:
        whole = alone(session)
        stop = next(token for token in whole[0][2:-1] if any(token not in answer for answer in whole))
        tokens = replace(session.manifest.tokens, stop_ids=(stop,))
        session.manifest = replace(session.manifest, tokens=tokens)
        expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in whole]
        assert lists(session.generate_ids_batch(questions(), NEW_TOKENS)) == expected
    assert len({len(answer) for answer in expected}) > 1


def test_routed_decoder_answers_as_segments_do(routed: Path, segmented: Path) -> None:
    with (
        open_bundle(routed, provider="cpu", threads=1) as one,
        open_bundle(segmented, provider="cpu", threads=1) as two,
    ):
        assert alone(one) == alone(two)
        for ids, pixels in questions():
            found, expected = one.logits(ids, pixels), two.logits(ids, pixels)
            assert (np.isnan(found) == np.isnan(expected)).all()
            assert np.nanmax(np.abs(found - expected)) < 5e-3 * np.nanmax(np.abs(expected))


def test_bundle_without_the_plugin_takes_batches_one_by_one(segmented: Path) -> None:
    with open_bundle(segmented, provider="cpu", threads=1) as session:
        assert lists(session.generate_ids_batch(questions(), NEW_TOKENS)) == alone(session)


def test_more_prompts_than_one_call_takes_are_answered_in_groups(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdeploy.runtime.backends.ort.MOST_LANES", 3)
    with open_bundle(routed, provider="cpu", threads=1) as session:
        assert lists(session.generate_ids_batch(questions(), NEW_TOKENS)) == alone(session)
        assert session.generate_ids_batch([]) == []


def test_text_of_a_batch_is_the_text_of_each(routed: Path) -> None:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]
    conversations: list[Any] = [[{"role": "user", "content": text}] for text in ("Hello", content)]
    with open_bundle(routed, provider="cpu", threads=1) as session:
        options = SamplingOptions(max_new_tokens=12)
        texts = session.generate_batch(conversations, options)
        assert texts == [session.answer(messages, options).text for messages in conversations]
        stop = texts[0][2:4]
        assert session.generate_batch(conversations, replace(options, stop=(stop,)))[0] == texts[0].split(stop)[0]


def test_drawn_texts_of_a_batch_are_those_of_each_alone(routed: Path) -> None:
    """With a seed. The penalty counts the ids of each lane, every lane draws for itself."""
    conversations = [[{"role": "user", "content": text}] for text in ("Hello", "Why is it so?", "", "Hello")]
    options = SamplingOptions(temperature=1.5, top_k=40, repetition_penalty=1.8, seed=11, max_new_tokens=15)
    with open_bundle(routed, provider="cpu", threads=1) as session:
        texts = session.generate_batch(conversations, options)
        assert texts == [session.answer(messages, options).text for messages in conversations]
    assert len(set(texts)) == 3


def test_picture_of_several_prompts_is_encoded_once(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = OrtBackend.encode_images

    def counted(backend: OrtBackend, pixels: Any) -> Any:
        encoded.append(len(pixels))
        return encode(backend, pixels)

    monkeypatch.setattr(OrtBackend, "encode_images", counted)
    (ids, pixels), _, _, other = questions()
    with open_bundle(routed, provider="cpu", threads=1) as session:
        first, second, third = lists(session.generate_ids_batch([(ids, pixels), other, (ids, pixels)], NEW_TOKENS))
    assert (encoded, first) == ([1, 1], third) and first != second


@pytest.mark.parametrize(("wrong", "message"), [
    (np.array([1, 5]), "found ndarray, expected a pair"),
    ((np.array([1, 5]),), "found tuple, expected a pair"),
    (None, "found NoneType, expected a pair"),
    (([], None), r"input_ids is float64 \[0\]"),
    (([[1], [2, 3]], None), "input_ids cannot be read as an array of numbers"),
    ((np.full(128, 5), None), "the prompt has 128 tokens .* and the context holds 128"),
    ((np.array([1, 5]), "picture.png"), "images cannot be read as an array of numbers"),
    ((np.array([1, 5]), np.zeros((3, 8, 8))), r"images is \[3, 8, 8\]"),
])  # fmt: skip
def test_wrong_prompt_of_a_batch_is_named(wrong: Any, message: str, routed: Path) -> None:
    with (
        open_bundle(routed, provider="cpu", threads=1) as session,
        pytest.raises(PromptError, match=rf"^prompts\[1\]: .*{message}"),
    ):
        session.generate_ids_batch([questions()[0], wrong, questions()[1]])


def test_wrong_conversation_of_a_batch_is_named(routed: Path) -> None:
    conversations: list[Any] = [[{"role": "user", "content": text}] for text in ("Hello", "x" * 200)]
    with (
        open_bundle(routed, provider="cpu", threads=1) as session,
        pytest.raises(PromptError, match=r"^conversations\[1\]: the prompt has 2\d\d tokens"),
    ):
        session.generate_batch(conversations)


def test_wrong_prompt_of_a_batch_is_told_before_anything_runs(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtBackend, "encode_images", None)
    with open_bundle(routed, provider="cpu", threads=1) as session, pytest.raises(PromptError, match=r"0\.\.258"):
        session.generate_ids_batch([*questions(), (np.array([1, 999]), None)])


@pytest.mark.parametrize("residency", ["all", "phase"])
def test_engines_answer_as_the_graphs_do(built: Path, routed: Path, residency: str) -> None:
    session, _ = open_fake(built, residency)
    with open_bundle(routed, provider="cpu", threads=1) as reference:
        assert alone(session) == alone(reference)
        assert lists(session.generate_ids_batch(questions(), NEW_TOKENS)) == alone(reference)
        for ids, pixels in questions():
            np.testing.assert_allclose(session.logits(ids, pixels), reference.logits(ids, pixels), atol=2e-3)


def test_planned_memory_is_that_of_a_whole_batch(built: Path) -> None:
    """It was counted for one prompt, so a benchmark told too little memory of engines that were built for several."""
    session, device = open_fake(built)
    found = device_memory(session.backend)
    empty_scratch = 1
    assert found.planned_bytes == device.used_bytes() - empty_scratch
    assert found.in_use is not None and found.in_use() == found.planned_bytes


def test_tokens_of_a_batch_are_launches_of_one_captured_graph(built: Path) -> None:
    session, device = open_fake(built)
    session.generate_ids_batch(questions()[:2], NEW_TOKENS)
    assert device.log.count("capture") == 1
    assert device.log.count("launch") >= 4
    session.generate_ids(*questions()[1], NEW_TOKENS)
    assert device.log.count("capture") == 2, "another number of prompts needs another graph"
    assert device.log.count("discard") == 1


def test_graph_is_captured_anew_after_its_engine_was_unloaded(built: Path) -> None:
    """A captured graph holds addresses of the engine that it was captured with."""
    session, device = open_fake(built, "phase")
    (ids, pixels), *_, (other_ids, other_pixels) = questions()
    session.generate_ids(ids, pixels, 4)
    session.generate_ids(other_ids, other_pixels, 4)
    events = [entry for entry in device.log if entry in ("capture", "launch", "discard", "load decoder.0")]
    answer = ["load decoder.0", "capture", "launch", "launch"]
    assert events == [*answer, "discard", *answer]


def test_pictures_of_a_batch_are_encoded_with_nothing_else_resident(built: Path) -> None:
    session, _ = open_fake(built, "phase")
    backend = session.backend
    assert isinstance(backend, TrtBackend)
    session.generate_ids_batch(questions()[1:3], 2)
    (_, pixels), *_ = questions()
    run, resident = backend._run, []

    def noted(graph: str, *rest: Any) -> None:
        run(graph, *rest)
        resident.append((graph, set(backend._engines)))

    backend._run = noted  # type: ignore[assignment, method-assign]
    session.generate_ids_batch(questions()[:3:2], 2)
    assert pixels is not None and resident[0] == ("vision", {"vision"})
    assert {graph for graph, _ in resident[1:]} == {"decoder"}
    assert all(held == {"decoder"} for _, held in resident[1:])


def test_graph_that_may_be_running_is_waited_for_before_it_goes(built: Path) -> None:
    session, device = open_fake(built)
    backend = session.backend
    assert isinstance(backend, TrtBackend)
    session.generate_ids_batch(questions()[1:3], 3)
    rows, mask = session.embedding[np.array([1, 5])], np.zeros(2, np.bool_)
    lanes = backend.new_lanes(1, 4)
    lanes.begin(0, np.arange(4))
    backend.run(Call.of_one(rows, mask, np.zeros(0, np.int64)), lanes)  # whose logits nobody waits for
    backend.decode(rows[:1], np.ones(1, np.bool_), lanes)
    assert device.log.count("discard") == 1


def test_graphs_of_one_phase_are_in_memory_at_a_time(routed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ONNX Runtime, over two batches with pictures."""
    loaded: list[tuple[str, list[str]]] = []
    load = OrtBackend._load_file

    def noted(backend: OrtBackend, graph: str) -> Any:
        loaded.append((graph, list(backend._sessions)))
        return load(backend, graph)

    monkeypatch.setattr(OrtBackend, "_load_file", noted)
    with open_bundle(routed, provider="cpu", threads=1, residency="phase") as session:
        for batch in (questions()[:2], questions()[2:]):
            session.generate_ids_batch(batch, 2)
    assert loaded == [("vision", []), ("decoder", [])] * 2


def test_memory_of_every_lane_is_planned(built: Path) -> None:
    manifest = read_manifest(built)
    sizes = {"vision": 0, "decoder": 0}
    for info in manifest.engines.values():
        sizes[info.graph] += manifest.files[info.file].bytes
    needed, buffers = needed_bytes(manifest, sizes, CHUNK_ROWS, LOGIT_ROWS, "all", BATCH)
    shape = manifest.cache
    assert buffers > 2 * LAYERS * BATCH * shape.kv_heads * manifest.context_tokens * shape.head_dim * 2
    for short, is_enough in ((0, True), (1, False)):
        device = FakeDevice(memory_bytes=needed - short)
        with contextlib.nullcontext() if is_enough else pytest.raises(BackendError, match="of GPU memory"):
            TrtBackend(BundleFiles(built, manifest), "all", fake_library(device), device)  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["", "engines/libvlmdeploy_routed.so"])
def test_plugin_library_of_the_bundle_is_registered_first(
    library: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, device, loaded = read_manifest(built), FakeDevice(), []
    monkeypatch.setattr("vlmdeploy.runtime.backends.trt.load_plugin_library", lambda path, _: loaded.append(path))
    if library:
        (built / library).write_bytes(b"")
    manifest = replace(manifest, plugin=PluginUse(1, library))
    TrtBackend(BundleFiles(built, manifest), "all", fake_library(device), device)  # type: ignore[arg-type]
    assert loaded == ([built / library] if library else [])


@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 100])
@pytest.mark.parametrize("lengths", [(1,), (8,), (9, 8, 1), (3, 25, 16, 17), (100, 1)])
def test_steps_read_every_position_once_and_end_together(lengths: tuple[int, ...], chunk_rows: int) -> None:
    steps = prefill_steps(dict(enumerate(lengths)), chunk_rows)
    for lane, length in enumerate(lengths):
        read = [step[lane] for step in steps if lane in step]
        assert [place for start, stop in read for place in range(start, stop)] == list(range(length))
        assert lane in steps[-1], "all end in the last call"
        counts = [stop - start for start, stop in read]
        assert counts[1:] == [chunk_rows] * (len(counts) - 1), "only the first call of a lane may be short"


def test_padding_stays_inside_each_lane() -> None:
    lengths, slots = (3, 25, 16, 17), 25
    for step in prefill_steps(dict(enumerate(lengths)), 8):
        rows = max(stop - start for start, stop in step.values())
        assert all(step.get(lane, (0, 0))[0] + rows <= slots for lane in range(len(lengths)))


def test_rows_get_the_positions_of_their_slots() -> None:
    lanes = Lanes(3, 4)
    lanes.begin(0, np.array([0, 1, 1, 2]))
    lanes.begin(1, np.array([0, 1, 2]))
    lanes.append(np.array([2, 3, 0]))
    assert lanes.starts(2).tolist() == [2, 2, 0], "a full lane is not read again"
    assert lanes.row_positions(np.array([2, 0, 0]), 3).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert (lanes.capacities > 0).tolist() == [True, True, False]
    assert (lanes.is_full(0), lanes.is_full(1)) == (False, True)
    assert lanes.most_rows([2]) == 2, "padding of the first lane ends with its slots"
    assert lanes.most_rows([0]) == 4


def loop_over(session: Session, count: int) -> GenerateLoop:
    backend = session.backend
    lanes = backend.new_lanes(count, session.manifest.context_tokens)
    return GenerateLoop(backend, session.embedding, backend.encode_images, session.manifest.tokens.stop_ids, lanes)


def request_of(session: Session, question: Question, new_tokens: int = NEW_TOKENS) -> Request:
    manifest = session.manifest
    prompt = make_prompt(*question, manifest.tokens, manifest.embedding.vocab_size, manifest.image.size_px)
    return Request(prompt, lambda logits, _: int(logits.argmax()), new_tokens)


@pytest.mark.parametrize("chunk_rows", [3, 256])
def test_lane_is_begun_and_ended_between_any_two_tokens(routed: Path, chunk_rows: int) -> None:
    """A prompt joins while others are answered, one is given up, another takes its lane: nobody notices."""
    with open_bundle(routed, provider="cpu", threads=1) as session:
        session.backend.chunk_rows = chunk_rows
        expected, requests = alone(session), [request_of(session, question) for question in questions()]
        loop = loop_over(session, 3)
        answers: dict[int, list[int]] = {number: [] for number in range(4)}
        held = {0: 1, 2: 0}  # which question each lane holds
        loop.begin({lane: requests[number] for lane, number in held.items()})
        for step in range(4 * NEW_TOKENS):
            if step == 3:
                held[1] = 3
                loop.begin({1: requests[3]})
            if step == 5:
                loop.end(0)
                del held[0]
            if step == 6:
                held[0] = 2
                loop.begin({0: requests[2]})
            for lane, token in loop.step().items():
                answers[held[lane]].append(token)
    assert answers[1] == expected[1][:5], "until it was given up"
    assert [answers[number] for number in (0, 2, 3)] == [expected[number] for number in (0, 2, 3)]
    assert len(expected[1]) > 5, "the seed's answer is longer"


def test_prompt_as_long_as_its_lane_joins_others(routed: Path) -> None:
    """Its lane is full before its only token is chosen: the others' next call has no room for its padding."""
    with open_bundle(routed, provider="cpu", threads=1) as session:
        long = (np.arange(128) % 250 + 3, None)
        expected, (question, *_) = alone(session)[0], questions()
        loop = loop_over(session, 2)
        loop.begin({0: request_of(session, question)})
        found = [loop.step()[0]]
        loop.begin({1: request_of(session, long, 1)})
        joined = loop.step()
        found.append(joined.pop(0))
        assert set(joined) == {1}
        found += [tokens[0] for tokens in loop]
    assert found == expected
