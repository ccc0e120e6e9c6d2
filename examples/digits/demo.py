"""Ask the exported digits model about one held-out scene: the last step of `make demo`.

Draws a test scene (digits the model never saw), asks a bundle where one of them is and what the largest one is, and
paints the box that comes back.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import DigitScenes, Scene

import vlmdeploy
from vlmdeploy.errors import VlmdeployError
from vlmdeploy.runtime.answer import Answer
from vlmdeploy.runtime.boxes import draw_boxes
from vlmdeploy.runtime.sampling import SamplingOptions
from vlmdeploy.runtime.session import Session

SEED = 7


def draw_scene(seed: int) -> tuple[Image.Image, Scene]:
    """A test scene of at least three different digits."""
    random = np.random.default_rng(seed)
    batch = DigitScenes("test").draw(32, random)
    scenes = [batch.scene(index) for index in range(32)]
    chosen = next(index for index, scene in enumerate(scenes) if len(set(scene.digits)) == len(scene.digits) >= 3)
    return Image.fromarray(batch.pixels[chosen]), scenes[chosen]


def ask(session: Session, image: Path, question: str) -> Answer:
    content = [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]
    return session.answer([{"role": "user", "content": content}], SamplingOptions())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=SEED, help="another scene")
    options = parser.parse_args()
    picture, scene = draw_scene(options.seed)
    image, painted = options.out / "scene.png", options.out / "scene_with_box.png"
    picture.save(image)
    try:
        session = vlmdeploy.open(options.bundle)
        question = f"Where is the {scene.digits[0]}?"
        answer = ask(session, image, question)
        largest = ask(session, image, "What is the largest digit?")
    except VlmdeployError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    draw_boxes(picture, answer.boxes).save(painted)
    print(f"picture   {image}")
    print(f"question  {question}")
    print(f"answer    {answer.text}  (true box in pixels: {list(scene.boxes[0])})")
    print(f"box       painted in {painted}: pixels {[[round(x, 1) for x in box.pixels] for box in answer.boxes]}")
    print(f"question  What is the largest digit?\nanswer    {largest.text}  (true: {max(scene.digits)})")
    timings = {phase: round(ms, 1) for phase, ms in answer.timings_ms.items()}
    print(f"timings   ms {timings}, {answer.prompt_tokens} prompt tokens, {answer.new_tokens} new")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
