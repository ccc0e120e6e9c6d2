"""The words of a report: names of tasks and metrics, the sentence on each model, and the message of each plot.

Page and summary share them. A difference is a loss or a gain only if its interval excludes 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from vlmdeploy.report.document import Frontier, FrontierPoint, ModelResult, Report
from vlmdeploy.report.numbers import Key, Phrase, Shown, short_label
from vlmdeploy.score.metrics import Score

TASKS = {"vqa": "VQA", "rec": "Boxes", "reg": "Regions", "caption": "Captions"}
TASK_TITLES = {
    "vqa": "VQA: questions about a picture",
    "rec": "Boxes: where something is (REC)",
    "reg": "Regions: what is in a box (REG)",
    "caption": "Captions",
}
METRICS = {
    "exact_match": "exact match",
    "acc@0.5": "IoU \N{GREATER-THAN OR EQUAL TO} 0.5",
    "mean_iou": "mean IoU",
    "parse_rate": "box can be read",
    "token_f1": "token F1",
}
MANY_NAMES = 4
NAME_LENGTH = 40  # of a model in a sentence
POINTS = "\N{NO-BREAK SPACE}points (95\N{NO-BREAK SPACE}%: "
SAME_SIZE = 0.02  # sizes and times that differ by less count as the same


def model_name(model: ModelResult | FrontierPoint) -> str:
    """A model in a sentence; a very long name is cut in its middle."""
    return short_label(model.name if isinstance(model, FrontierPoint) else model.subject.name, NAME_LENGTH)


def task_name(task: str) -> str:
    """A task in one word."""
    return TASKS.get(task, task)


def task_title(task: str) -> str:
    """A task as a heading."""
    return TASK_TITLES.get(task, task)


def metric_name(metric: str) -> str:
    """A metric in words, with its kind of question if it has one: "exact match, sum"."""
    name, _, kind = metric.partition("/")
    return METRICS.get(name, name) + (f", {kind.replace('_', ' ')}" if kind else "")


def kind_name(metric: str) -> str:
    """The kind of question in a metric's name: "exact_match/left_right" is "left right"."""
    return metric.partition("/")[2].replace("_", " ")


def kinds_of(metrics: Iterable[str]) -> list[str]:
    """A task's metrics for single kinds of question."""
    return [metric for metric in metrics if "/" in metric]


def sources(report: Report, part: str) -> str:
    """The questions that the models' "agreement" or "text_only" was measured on, in words."""
    found = [getattr(model, part) for model in report.models]
    return joined(list(dict.fromkeys(each.source for each in found if each is not None)) or ["nothing"])


def memory_phases(report: Report) -> list[str]:
    """The phases with a measured memory of any model."""
    return list(dict.fromkeys(phase for _, each in report.measured for phase in each.memory.phases))


def has_device_memory(report: Report) -> bool:
    """Whether any model's GPU memory is known."""
    return any(each.memory.device_planned_bytes is not None for _, each in report.measured)


def unmeasured(report: Report) -> dict[str, list[str]]:
    """Names of the unmeasured models, by reason."""
    return _by_reason((model.unmeasured, model.subject.name) for model in report.models if model.measurement is None)


def energy_unknown(report: Report) -> dict[str, list[str]]:
    """Names of the measured models with unknown energy, by reason."""
    return _by_reason((each.energy_unknown, model.subject.name) for model, each in report.measured if not each.energy)


def _by_reason(pairs: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for reason, name in pairs:
        reasons.setdefault((reason or "").rstrip("."), []).append(name)
    return reasons


def methods(report: Report) -> str:
    """How memory was measured."""
    memories = [each.memory for _, each in report.measured]
    return "; ".join(dict.fromkeys(text for memory in memories for text in (memory.method, memory.device_method)))


def main_metrics(model: ModelResult) -> list[tuple[str, str]]:
    """(task, metric) of the first metric of every task."""
    return [(task, next(iter(metrics))) for task, metrics in model.tasks.items() if metrics]


def main_differences(model: ModelResult) -> dict[tuple[str, str], Score]:
    """The differences of the main metrics, by (task, metric)."""
    differences = model.differences or {}
    pairs = ((task, metric) for task, metric in main_metrics(model) if metric in differences.get(task, {}))
    return {(task, metric): differences[task][metric] for task, metric in pairs}


def verdict(difference: Score) -> str:
    """What the interval of a paired difference shows."""
    if difference.low > 0:
        return "a gain"
    if difference.high < 0:
        return "a loss"
    if difference.value == difference.low == difference.high == 0:
        return "no difference"
    return "no loss seen"


def peak_key(report: Report, place: int) -> Key | None:
    """The key of a measured model's highest memory over all phases."""
    measurement = report.models[place].measurement
    if measurement is None or not measurement.memory.phases:
        return None
    phases = measurement.memory.phases
    highest = max(phases, key=lambda name: phases[name].peak_bytes)
    return ("models", place, "measurement", "memory", "phases", highest, "peak_bytes")


def model_sentence(report: Report, place: int) -> list[Phrase]:
    """One sentence on a model, without its name: what it lost, how much smaller and faster it is."""
    model = report.models[place]
    if place == 0:
        clauses = [_scores(report), *_reference_costs(report)]
    else:
        clauses = [_losses(model, place), _size(report, place), *_speed(report, place)]
    pieces: list[Phrase] = []
    for clause in filter(None, clauses):
        pieces += ["; ", *clause] if pieces else clause
    return pieces


def _scores(report: Report) -> list[Phrase]:
    pieces: list[Phrase] = ["the reference"]
    for number, (task, metric) in enumerate(main_metrics(report.models[0])):
        key = ("models", 0, "tasks", task, metric, "value")
        pieces += [": " if number == 0 else ", ", f"{task_name(task)} ", Shown("share", key)]
    return pieces


def _reference_costs(report: Report) -> list[list[Phrase]]:
    size: list[Phrase] = [Shown("size", ("models", 0, "subject", "size_bytes")), " on disk"]
    if report.models[0].measurement is None:
        return [size]
    return [size, ["first token after ", Shown("amount", _first_token(0)), "\N{NO-BREAK SPACE}ms"]]


def _losses(model: ModelResult, place: int) -> list[Phrase]:
    """The first task with its difference, other tasks with a loss or gain, then the tasks without."""
    differences = main_differences(model)
    if not differences:
        return ["not compared with the reference"]
    main = list(differences)
    verdicts = {task: verdict(found) for (task, _), found in differences.items()}
    told = [pair for pair in main if pair == main[0] or verdicts[pair[0]] in ("a gain", "a loss")]
    pieces: list[Phrase] = []
    for task, metric in told:
        pieces += ["; "] if pieces else []
        found = difference(("models", place, "differences", task, metric), POINTS)
        pieces += [f"{task_name(task)} ", *found, f": {verdicts[task]}"]
    untold = [task_name(task).lower() for task, metric in main if (task, metric) not in told]
    if untold:
        is_second = told == main[:1] and verdicts[main[0][0]] == "no loss seen"
        pieces += [", nor in " if is_second else "; no loss seen in ", joined(untold, "or")]
    return pieces


def difference(key: Key, opening: str = " (") -> list[Phrase]:
    """The paired difference at a key, with its interval."""
    value, low, high = (Shown("points", (*key, end)) for end in ("value", "low", "high"))
    return [value, opening, low, " to ", high, ")"]


def _size(report: Report, place: int) -> list[Phrase]:
    keys = [("models", each, "subject", "size_bytes") for each in (place, 0)]
    sizes = [report.models[each].subject.size_bytes for each in (place, 0)]
    return _compared(sizes[0], sizes[1], (keys[0], keys[1]), ("smaller", "larger", "the same size"))


def _speed(report: Report, place: int) -> list[list[Phrase]]:
    mine, reference = report.models[place].measurement, report.models[0].measurement
    if mine is None:
        return []
    if reference is None:
        return [["first token after ", Shown("amount", _first_token(place)), "\N{NO-BREAK SPACE}ms"]]
    keys = (_first_token(place), _first_token(0))
    words = ("faster", "slower", "as fast")
    return [["first token ", *_compared(mine.first_token.p50, reference.first_token.p50, keys, words)]]


def _first_token(place: int) -> Key:
    return ("models", place, "measurement", "first_token", "p50")


def _compared(mine: float, other: float, keys: tuple[Key, Key], words: tuple[str, str, str]) -> list[Phrase]:
    """By which factor a value is less or more, or that it is the same."""
    if mine <= 0 or other <= 0 or abs(mine / other - 1) < SAME_SIZE:
        return [words[2]] if mine > 0 and other > 0 else []
    less = mine < other
    top, bottom = (keys[1], keys[0]) if less else keys
    return [
        Shown("times", top, bottom),
        f"\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}{words[0 if less else 1]}",
    ]


def joined(names: Sequence[str], word: str = "and") -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def frontier_message(report: Report, other: str) -> list[Phrase]:
    """The message of the plot of accuracy against `other` ("latency_ms" or "peak_bytes")."""
    frontier = report.frontier
    assert frontier is not None, "drawn only if there are points"
    best = _extreme(frontier, lambda point: -point.accuracy)
    least = _extreme(frontier, lambda point: float(getattr(point, other)))
    word, form, unit = ("fastest", "amount", " ms") if other == "latency_ms" else ("smallest in memory", "size", "")
    kept = [model_name(point) for point in frontier.points if not point.is_dominated]
    return [
        f"Most accurate: {model_name(frontier.points[best])} (",
        Shown("share", ("frontier", "points", best, "accuracy")),
        f"); {word}: {model_name(frontier.points[least])} (",
        Shown(form, ("frontier", "points", least, other)),
        f"{unit}). ",
        f"Not dominated: {joined(_limited(kept, 2 * MANY_NAMES))}." if kept else "All are dominated.",
    ]


def _limited(names: list[str], most: int) -> list[str]:
    return names if len(names) <= most else [*names[:most], "others"]


def _extreme(frontier: Frontier, key: Callable[[FrontierPoint], float]) -> int:
    return min(range(len(frontier.points)), key=lambda place: key(frontier.points[place]))


def differences_message(report: Report) -> list[Phrase]:
    """The models with a loss or a gain, and the tasks."""
    losses, gains = _with_verdict(report, "a loss"), _with_verdict(report, "a gain")
    loss = f"Intervals entirely below 0, a loss: {joined(losses)}." if losses else "No interval is entirely below 0."
    return [f"{loss} Entirely above, a gain: {joined(gains)}." if gains else loss]


def _with_verdict(report: Report, wanted: str) -> list[str]:
    """The models with that verdict on a task, "name (task, task)"; at most MANY_NAMES, then "others"."""
    found = []
    for model in report.models[1:]:
        tasks = [task_name(task) for (task, _), each in main_differences(model).items() if verdict(each) == wanted]
        if tasks:
            found.append(f"{model_name(model)} ({', '.join(tasks)})")
    return _limited(found, MANY_NAMES)


def range_message(report: Report, found: Mapping[int, tuple[Key, float]], form: str, unit: str) -> list[Phrase]:
    """The models with the least and the most of something. found: by place of the model, a number's key and value."""
    least, most = min(found, key=lambda place: found[place][1]), max(found, key=lambda place: found[place][1])
    names = [model_name(report.models[place]) for place in (least, most)]
    pieces: list[Phrase] = [f"{names[0]}: ", Shown(form, found[least][0]), unit]
    if least == most:
        return [*pieces, "."]
    return ["Least: ", *pieces, f"; most: {names[1]}: ", Shown(form, found[most][0]), f"{unit}."]
