"""Every command that writes, small: its inputs, and its words with what it writes in the directory ``out``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.evaluation import tiny_clip
from tests.evaluation.tiny import write_network
from tests.trainer import tiny

STEPS = 4


def write_inputs(root: Path) -> dict[str, list[str]]:
    """Write what the commands read into ``root``; the words of each, by a name."""
    base = tiny.write_model(root / "model")
    write_network(root / "brighter", base)
    pairs = str(tiny.write_data(root / "pairs.parquet", pairs=8, scores=False))
    clip = tiny_clip.write_clip(root / "clip")
    (root / "prompts.txt").write_text("a one\na two\na three")
    draw, lines = np.random.default_rng(0), []
    for i in range(4):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / f"{i}.png")
        image = {"prompt_id": "a", "prompt": "a one", "image": f"{i}.png", "objects": [{"id": "a", "name": "cube"}]}
        lines.append(json.dumps({**image, "scores": {"q": i / 4}}))
    (root / "structured.jsonl").write_text("\n".join(lines) + "\n")
    sampling: dict[str, Any] = {"prompts": str(root / "prompts.txt"), "scorers": ["tests.evaluation.tiny:brightness"]}
    config = tiny.mapping(
        root,
        model={"family": "stable-diffusion", "path": str(base), "lora": {"rank": 2}},
        training={"steps": STEPS, "batch_size": 2},
        evaluation={**sampling, "every": 2, "num_inference_steps": 2, "guidance_scale": 1.0},
        output={"directory": "out", "checkpoint_every": 2, "keep_checkpoints": 1, "tensorboard": False},
    )
    (root / "train.yaml").write_text(yaml.safe_dump(config))
    inverted = tiny.mapping(root, "inversion-dpo", cache={"path": "out"}, output={"directory": "none"})
    (root / "precompute.yaml").write_text(yaml.safe_dump(inverted))
    compared = ["--base", str(base), "--aligned", str(root / "brighter"), "--prompts", str(root / "prompts.txt")]
    return {
        "train": ["train", str(root / "train.yaml"), "--no-progress"],
        "precompute": ["precompute", str(root / "precompute.yaml"), "--no-progress"],
        "score": [
            *("score", pairs, "--scorer", f"pickscore={clip}", "--output", "out/scored.parquet", "--no-progress"),
            "max_broken=1",
        ],
        "build": ["data", "build", str(root / "structured.jsonl"), "--output", "out/built.parquet", "--weight", "q=1"],
        "inspect": ["data", "inspect", pairs, "--output", "out"],
        "evaluate": [
            *("evaluate", *compared, "--scorer", "tests.evaluation.tiny:brightness", "--output", "out"),
            *("--family", "stable-diffusion", "num_inference_steps=2", "guidance_scale=1.0", "batch_size=2"),
        ],
        "invert": [
            *("invert", str(root / "0.png"), str(root / "1.png"), "--model", str(base), "--family", "stable-diffusion"),
            *("--output", "out", "--num-inference-steps", "2"),
        ],
    }
