"""Configuration: every mistake is an error naming key, value and remedy; presets hold the published numbers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from fastinvdpo.cli.options import read_config
from fastinvdpo.config.files import parse_yaml
from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer import TrainConfig, load_config, presets, to_yaml
from tests.trainer.tiny import mapping

# ruff: noqa: E501 - tables have a row a case

MOVING = {"name": "linear-dpo", "reference": "ema"}
DRAWS = {"path": "cache", "draws": 3}
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown section": ("diffusion-dpo", {"trainig.steps": 3}, r"trainig = .*not a known key.*did you mean training\?"),
    "unknown key": ("diffusion-dpo", {"training.step": 3}, r"training\.step = 3: .*did you mean training\.steps\?"),
    "key of another section": ("diffusion-dpo", {"training.learning_rate": 1e-4}, r"training\.learning_rate = 0\.0001.*did you mean optimizer\.learning_rate\?"),
    "unknown key without a neighbor": ("diffusion-dpo", {"output.zzz": 1}, r"output\.zzz = 1.*known keys here: directory"),
    "unknown lora key": ("diffusion-dpo", {"model.lora": {"rnk": 4}}, r"model\.lora\.rnk = 4.*model\.lora\.rank"),
    "option of another method": ("diffusion-dpo", {"method.eta": 0.1}, r"method\.eta = 0\.1: is an option of another"),
    "misspelt option": ("inpo", {"method.betta": 1.0}, r"method\.betta = 1\.0.*did you mean method\.beta\?"),
    "unknown method": ("inpo", {"method.name": "ipno"}, r"method\.name = 'ipno'.*'inpo'"),
    "a list of methods": ("inpo", {"method.name": ["ipno"]}, r"method\.name = \['ipno'\]: names no known"),
    "no method name": ("inpo", {"method": {"beta": 3.0}}, r"method\.name = None: is missing"),
    "method is text": ("inpo", {"method": "inpo"}, r"method = 'inpo'.*mapping"),
    "text for a number": ("inpo", {"training.steps": "ten"}, r"training\.steps = 'ten'.*whole number"),
    "bool for a count": ("inpo", {"training.steps": True}, r"training\.steps = True.*whole number"),
    "number for text": ("inpo", {"model.path": 3}, r"model\.path = 3.*write text"),
    "text for a bool": ("inpo", {"data.random_flip": "yes"}, r"data\.random_flip = 'yes'.*true or false"),
    "zero steps": ("inpo", {"training.steps": 0}, r"training\.steps = 0: .*greater than or equal to 1"),
    "negative beta": ("inpo", {"method.beta": -1.0}, r"method\.beta = -1\.0: .*positive"),
    "infinite beta": ("inpo", {"method.beta": float("inf")}, r"method\.beta = inf: .*finite"),
    "ema decay of one": ("inpo", {"training.ema_decay": 1.0}, r"training\.ema_decay = 1\.0: .*less than 1"),
    "unknown precision": ("inpo", {"training.mixed_precision": "fp8"}, r"mixed_precision = 'fp8'.*'no', 'bf16' or 'fp16'"),
    "unknown utility": ("inpo", {"method.utility": "sigmod"}, r"method\.utility = 'sigmod'.*sigmoid"),
    "unknown family": ("inpo", {"model.family": "sd"}, r"model\.family = 'sd'.*'stable-diffusion'"),
    "unknown scheduler": ("inpo", {"optimizer.lr_scheduler": "cos"}, r"lr_scheduler = 'cos'.*'cosine'"),
    "rank zero": ("inpo", {"model.lora": {"rank": 0}}, r"model\.lora\.rank = 0"),
    "no lora targets": ("inpo", {"model.lora": {"target_modules": []}}, r"model\.lora\.target_modules = \[\]"),
    "warm-up longer than the run": ("inpo", {"optimizer.warmup_steps": 7}, r"warmup_steps = 7: exceeds training\.steps = 6"),
    "warm-up of a constant rate": ("inpo", {"optimizer.lr_scheduler": "constant"}, r"optimizer\.warmup_steps = 2: is ignored by lr_scheduler constant"),
    "smoothing without its utility": ("inpo", {"method.label_smoothing": 0.1}, r"label_smoothing = 0\.1: .*'sigmoid'"),
    "cdpo without smoothing": ("inpo", {"method.utility": "cdpo"}, r"label_smoothing = 0\.0: .*same as sigmoid"),
    "one pass without a trajectory": ("inpo", {"training.gradient_passes": 1}, r"gradient_passes = 1: means nothing"),
    "three passes": ("inversion-dpo", {"training.gradient_passes": 3}, r"gradient_passes = 3: .*1 or 2"),
    "calls of no size": ("inpo", {"training.max_batch": 0}, r"training\.max_batch = 0: .*greater than or equal to 1"),
    "calls of unknown size": ("inpo", {"training.max_batch": "auto"}, r"training\.max_batch = 'auto'.*whole number"),
    "fp16 on a CPU": ("inpo", {"training.mixed_precision": "fp16"}, r"mixed_precision = 'fp16': needs a GPU"),
    "cache with flips": ("inpo", {"cache": {"path": "cache"}, "data.random_flip": True}, r"cache\.path = 'cache': needs the same latents at every visit, and data\.random_flip changes them"),
    "cache with random crops": ("diffusion-dpo", {"cache": {"path": "cache"}, "data.center_crop": False, "data.resolution": 8}, r"cache\.path = 'cache': .*center_crop"),
    "trajectories with caption dropout": ("inversion-dpo", {"cache": {"path": "cache"}, "data.caption_dropout": 0.1}, r"cache\.path = 'cache': .*caption_dropout"),
    "unknown type of a cache": ("inpo", {"cache": {"dtype": "fp16"}}, r"cache\.dtype = 'fp16'.*'fp32' or 'bf16'"),
    "former key of the cache": ("inversion-dpo", {"training.cache_trajectories": True}, r"training\.cache_trajectories = True: is not a known key"),
    "type of a reference that is the policy": ("inpo", {"model.lora": {"rank": 2}, "model.reference_dtype": "bf16"}, r"model\.reference_dtype = 'bf16': has no meaning with LoRA"),
    "4 bits of a reference that is the policy": ("inpo", {"model.lora": {"rank": 2}, "model.reference_quantization": "nf4"}, r"model\.reference_quantization = 'nf4': has no meaning with LoRA.*set model\.quantization instead"),
    "frozen weights without an adapter": ("inpo", {"model.quantization": "nf4"}, r"model\.quantization = 'nf4': freezes what full .*add model\.lora; .*model\.reference_quantization"),
    "unknown type of frozen weights": ("inpo", {"model.lora": {"rank": 2}, "model.quantization": "fp4"}, r"model\.quantization = 'fp4'.*'int8' or 'nf4'"),
    "nothing to move": ("inpo", {"model.lora": {"rank": 2}, "model.offload": True}, r"model\.offload = True: moves quantized weights alone.*model\.quantization"),
    "compiled layers in 8 bits": ("diffusion-dpo", {"model.lora": {"rank": 2}, "model.quantization": "int8", "performance": {"compile": True}}, r"performance\.compile = True: is not built for layers in int8"),
    "first moment of adafactor": ("inpo", {"optimizer.name": "adafactor", "optimizer.beta1": 0.95}, r"optimizer\.beta1 = 0\.95: belongs to Adam"),
    "decay of adafactor": ("inpo", {"optimizer.name": "adafactor", "optimizer.beta2": 0.99}, r"optimizer\.beta2 = 0\.99: belongs to Adam"),
    "epsilon of adafactor": ("inpo", {"optimizer.name": "adafactor", "optimizer.epsilon": 1e-6}, r"optimizer\.epsilon = 1e-06: belongs to Adam"),
    "unknown optimizer": ("inpo", {"optimizer.name": "sgd"}, r"optimizer\.name = 'sgd'.*'adafactor'"),
    "unknown type of the reference": ("inpo", {"model.reference_dtype": "8bit"}, r"model\.reference_dtype = '8bit'.*'fp32' or 'bf16'"),
    "distance without perturbation": ("inversion-dpo", {"method.variant": "distance"}, r"model\.init_perturbation = 0\.0: .*exactly zero"),
    "released code of another variant": ("inversion-dpo", {"method.compat": "released", "method.variant": "endpoint"}, r"method\.variant = 'endpoint': .*released code"),
    "more timesteps than levels": ("inversion-dpo", {"method.timesteps_per_step": 4}, r"method\.timesteps_per_step = 4: exceeds num_inference_steps = 3"),
    "score range of zero": ("smpo", {"method.score_range": 0.0}, r"method\.score_range = 0\.0: is neither a number above"),
    "score range in words": ("smpo", {"method.score_range": "wide"}, r"method\.score_range = 'wide': is neither a number"),
    "unknown column": ("smpo", {"data.columns": {"winner": "a"}}, r"data\.columns\.winner = 'a'.*jpg_0"),
    "score of one side": ("smpo", {"data.columns": {"score_0": "a"}}, r"data\.columns = .*both score_0 and score_1"),
    "crop of unknown size": ("inpo", {"data.center_crop": False}, r"data\.center_crop = False: .*data\.resolution"),
    "unknown format": ("inpo", {"data.format": "zip"}, r"data\.format = 'zip'.*webdataset"),
    "share of all rows": ("inpo", {"data.max_broken": 1.0}, r"data\.max_broken = 1\.0: is neither a count"),
    "bool for a count of rows": ("inpo", {"data.max_broken": True}, r"data\.max_broken = True: is neither a count"),
    "buckets of no area": ("inpo", {"data.buckets": {}}, r"data\.buckets = None: have no area.*data\.resolution"),
    "buckets of another unit": ("inpo", {"data.buckets": {"multiple": 64}, "data.resolution": 100}, r"data\.resolution = 100: is not a multiple of data\.buckets\.multiple = 64"),
    "unknown key of buckets": ("inpo", {"data.buckets": {"size": 64}}, r"data\.buckets\.size = 64.*multiple"),
    "buckets of a stream": ("inpo", {"data.buckets": {"multiple": 8}, "data.resolution": 8, "data.streaming": True}, r"data\.streaming = True: .*need all their sizes"),
    "buckets in a cache": ("inpo", {"data.buckets": {"multiple": 8}, "data.resolution": 8, "cache": {"path": "cache"}}, r"cache\.path = 'cache': stores latents of one size"),
    **{f"{key} = {value}": ("inpo", {key: value}, re.escape(f"{key} = {value!r}: ")) for key, value in {
        "training.steps": 2.5, "training.batch_size": 0, "training.gradient_accumulation_steps": 0, "training.seed": -1,
        "optimizer.learning_rate": float("nan"), "output.keep_checkpoints": 0, "method.eta": 2.0, "data.path": None,
        "data.caption_dropout": 1.0}.items()},
    "rounded weights that follow": ("diffusion-dpo", {"method": MOVING, "model.reference_dtype": "bf16"}, r"model\.reference_dtype = 'bf16': stands still"),
    "weights in 8 bits that follow": ("diffusion-dpo", {"method": MOVING, "model.reference_quantization": "int8"}, r"model\.reference_quantization = 'int8': stands still"),
    "type of no reference": ("diffusion-dpo", {"method": {"name": "mapo"}, "model.reference_dtype": "fp32"}, "has no meaning with method mapo"),
    "bits of no reference": ("diffusion-dpo", {"method": {"name": "mapo"}, "model.reference_quantization": "nf4"}, "has no meaning with method mapo"),
    "masks of released code": ("diffusion-dpo", {"data.masks": True, "method.compat": "released"}, r"method\.compat = 'released': reproduces code that has no m"),
    "masks that are named and unread": ("diffusion-dpo", {"data.columns": {"mask_0": "mask_0"}}, r"data\.masks = False: leaves mask_0 unread"),
    "likes without a method for them": ("diffusion-dpo", {"data.form": "likes"}, r"data\.form = 'likes': has no pairs to compare, as method diffusion-dpo does"),
    "shares of labels in buckets": ("diffusion-dpo", {"method": {"name": "kto"}, "data.buckets": {"multiple": 8}, "data.resolution": 8}, r"method\.like_share = 0\.8: balances labels draw by draw, and data\.buckets"),
    "noise of buckets": ("diffusion-dpo", {"method": {"name": "pnapo"}, "data.buckets": {"multiple": 8}, "data.resolution": 8}, r"data\.buckets = .*: resize and crop images, and pnapo needs"),
    "draws without a cache": ("diffusion-dpo", {"cache": {"draws": 3}}, r"cache\.draws = 3: are stored in a cache, and there is none"),
    "draws of the policy": ("inpo", {"cache": DRAWS}, r"inpo makes them with the policy.*set method\.inverter to reference"),
    "draws of a reference that follows": ("diffusion-dpo", {"method": MOVING, "cache": DRAWS}, r"hold what the reference predicts, and method\.reference = ema.*set method\.reference to frozen"),
    "draws of a chain": ("inversion-dpo", {"cache": DRAWS}, "inversion-dpo scores a chain"),
    "draws of no reference": ("diffusion-dpo", {"method": {"name": "mapo"}, "cache": DRAWS}, "mapo has none"),
    "no draws": ("diffusion-dpo", {"cache": {"path": "cache", "draws": 0}}, r"cache\.draws = 0: "),
    "xformers on a CPU": ("inpo", {"performance": {"attention": "xformers"}}, r"performance\.attention = 'xformers': needs CUDA"),
    "graphs on a CPU": ("inpo", {"performance": {"cuda_graphs": True}}, r"performance\.cuda_graphs = True: needs CUDA"),
    "tf32 on a CPU": ("inpo", {"performance": {"tf32": True}}, r"performance\.tf32 = True: needs CUDA"),
    "compiled calls of many shapes": ("inpo", {"performance": {"compile": True}}, r"performance\.compile = True: .*set method\.static_shapes to"),
    "layout that an optimizer undoes": ("inpo", {"performance": {"channels_last": True}, "optimizer.name": "adamw8bit"}, r"performance\.channels_last = True: is undone by optimizer adamw8bit"),
    "unknown attention": ("inpo", {"performance": {"attention": "flash"}}, r"performance\.attention = 'flash'.*'sdpa' or 'xformers'"),
    "unknown switch": ("inpo", {"performance": {"compiled": True}}, r"performance\.compiled.*compile"),
    "negative guidance": ("inversion-dpo", {"method.guidance_scale": -1.0}, r"method\.guidance_scale = -1\.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_names_key_value_and_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    method, changes, message = MISTAKES[name]
    values = mapping(tmp_path, method)
    for key, value in changes.items():
        section, _, option = key.partition(".")
        if option:
            values.setdefault(section, {})[option] = value
        else:
            values[section] = value
    with pytest.raises(InvalidInput, match=message) as caught:
        TrainConfig.from_mapping(values)
    assert "Remedy: " in str(caught.value)


def test_without_a_mistake_the_table_is_valid_and_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    for method in ("diffusion-dpo", "inpo", "smpo", "inversion-dpo"):
        assert TrainConfig.from_mapping(mapping(tmp_path, method)).method.name == method
    values = mapping(tmp_path, training={"steps": 0, "stepz": 1}, optimizer={"learning_rate": "fast"})
    with pytest.raises(InvalidInput) as caught:
        TrainConfig.from_mapping(values)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-8", 1e-8), ("1.0e-8", 1e-8), ("2E+3", 2000.0), (".5", 0.5), ("-1", -1), ("010", 10), ("1_000", 1000)),
        *((text, text) for text in ("no", "on", "1.2.3", "2024-05-01", "=")),
        *(("true", True), ("null", None), ("[1, 2]", [1, 2]), ("'1e-8'", "1e-8")),
        *(("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}), ("a: &x [1]\nb: *x", {"a": [1], "b": [1]})),
    ],
)
def test_yaml_values(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MINIMAL = "method: {name: inpo}\nmodel: {family: stable-diffusion, path: m}\ndata: {path: p}\noutput: {directory: %s}\n"


def test_overrides_win_and_create_sections(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.yaml", MINIMAL % tmp_path)
    changes = ["optimizer.learning_rate=1e-5", "training.mixed_precision=no", "model.lora.rank=4", "method.eta=0"]
    config = load_config(path, changes)
    assert (config.optimizer.learning_rate, config.training.mixed_precision) == (1e-5, "no")
    assert config.model.lora is not None and config.model.lora.rank == 4
    assert vars(config.method)["eta"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "not a mapping of sections"),
        ("", "method = None: is missing"),
        ("data: {path: x}\ndata: {path: y}", "line 1, column 1: the key data stands twice"),
        ("training: {steps: 1, steps: 2}", "the key steps stands twice"),
        ("a: &a [*a]", "stand for more than"),
        (
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
            "stand for more than",
        ),
        ("[" * 5000, "nested too deeply"),
        ("training: {steps: " + "9" * 6000, "not valid YAML"),
        ("training: {steps: " + "9" * 400 + "}", r"training\.steps = 9+"),
        ("data: !!python/object/apply:os.system ['touch hit']", "could not determine a constructor"),
        ('data: {path: "a\\0b"}', r"data\.path = 'a\\x00b': holds NUL"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_config(_write(tmp_path / "c.yaml", text))


@pytest.mark.parametrize(
    "text", ["root:SECRET:1:\nbin:SECRET", "SECRET", "a: [SECRET", "SECRET: {SECRET: SECRET", "a: {b: SECRET}"]
)
def test_errors_show_nothing_of_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_config(_write(tmp_path / "c.yaml", text))
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("~/x", "/home/me/x"), ("$PLACE/x", "/some $5 place/x"), ("${PLACE}y", "/some $5 placey")),
        *(("$$PLACE/$5", "$PLACE/$5"), ("'it''s'", "it's")),
        *((text, text) for text in ("./~a", "runs/style #3", "runs/a: b = c, d", "2024", "2024-05-01", "0123")),
        ("*.x&!%@", "*.x&!%@"),
    ],
)
def test_paths_mean_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/some $5 place")
    config = load_config(overrides=[f"data.path={written}"], preset="inpo-sd15")
    assert config.data.path == meant
    assert load_config(_write(tmp_path / "again.yaml", to_yaml(config))) == config
    assert TrainConfig.from_mapping(config.as_dict()) == config


def test_files_hold_text_where_paths_are_and_other_methods_than_the_preset(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.yaml", "data: {path: 2024, image_root: 1e5}\noutput: {directory: 2024-05-01}\n")
    config = load_config(path, preset="inpo-sd15")
    assert (config.data.path, config.data.image_root, config.output.directory) == ("2024", "1e5", "2024-05-01")
    path = _write(tmp_path / "c.yaml", "method: {name: diffusion-dpo, beta: 7}\ndata: {path: p}\n")
    config = load_config(path, preset="inpo-sd15")
    assert (config.method.beta, config.training.steps) == (7, 400), "all options of the method are replaced"
    config = TrainConfig.from_mapping(mapping(tmp_path, "smpo", model={"lora": {"rank": 4}}))
    assert load_config(_write(tmp_path / "resolved.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps"], r"override = 'training\.steps': is not of the form"),
        (["=3"], r"override = '=3'"),
        (["training..steps=3"], r"is not of the form"),
        (["model.path.x=3"], r"model\.path\.x = '3': sets a key below model\.path"),
        (["model.lora={rank: 4"], r"model\.lora = .*not valid YAML"),
        (["data.path=$NOT_SET/x"], r"data\.path = .*variable NOT_SET is not set"),
        (["evaluation.prompts=${NOT_SET}", "evaluation.scorers=[a]"], r"evaluation\.prompts = .*NOT_SET"),
        (["data.path=~nobody-here/x"], r"data\.path = .*home directory of nobody"),
        (["cache.path=None"], r"cache\.path = 'None': is text here.*write null"),
        (["data.path='x' # y"], r"there is more after the value"),
        (["data.path=x", "data.path=y"], r"data\.path = 'y': is given beside data\.path=x"),
        (["model.lora.rank=4", "model.lora=null"], r"model\.lora = 'null': is given beside model\.lora\.rank=4"),
        (["method.timesteps.valus=[1]"], r"method\.timesteps\.valus.*did you mean method\.timesteps\.values\?"),
        (["method.timesteps.density=normal"], r"method\.timesteps\.density = 'normal'.*'logit-normal'"),
        (["method.timesteps.range=[1]"], r"method\.timesteps\.range = \[1\]"),
        (["model.family=sdxl"], r"model\.family = 'sdxl'.*'auto'"),
        (["output.push_to_hub=true"], r"output\.push_to_hub = True"),
        ([], r"data\.path = None: is missing"),
    ],
)
def test_overrides_that_mean_nothing_or_undo_another(overrides: list[str], message: str) -> None:
    data = [] if not overrides or overrides[0].startswith("data.") else ["data.path=x"]
    with pytest.raises(InvalidInput, match=message):
        load_config(overrides=[*data, *overrides], preset="inpo-sd15")


def test_a_configuration_lies_anywhere_and_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "lr=1e-5"
    place.mkdir()
    _write(place / "c.yaml", MINIMAL % tmp_path)
    _write(tmp_path / "b=1.yaml", MINIMAL % tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("lr=1e-5/c.yaml", "~/lr=1e-5/c.yaml", "b=1.yaml"):
        assert read_config([name, "training.steps=700"], None).training.steps == 700
    assert read_config(["data.path=x"], "inpo-sd15").data.path == "x"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", "lr=1e-5/no.yaml"):
        with pytest.raises(InvalidInput, match=r"config = .*cannot be read"):
            read_config([name], None)


# Method and base model: options of the method, learning rate at the whole batch, steps, warm-up, effective batch.
SMPO = {"renoise_iterations": 1, "preference_scale": 10, "score_range": 0.16658}
INVERSION = {"beta": 2000, "num_inference_steps": 80, "guidance_scale": 2.0, "timesteps_per_step": None}
PUBLISHED: dict[str, tuple[dict[str, Any], float, int, int, int]] = {
    "diffusion-dpo-sd15": ({"beta": 5000}, 2048e-8, 2000, 500, 2048),
    "diffusion-dpo-sdxl-refiner": ({"beta": 5000}, 2048e-8, 2000, 200, 2048),
    "diffusion-dpo-sdxl-turbo": ({"beta": 5000}, 2048e-8, 2000, 200, 2048),
    "diffusion-dpo-sdxl": ({"beta": 5000}, 2048e-8, 2000, 200, 2048),
    "inpo-sd15": ({"beta": 2000, "num_inference_steps": 10, "eta": 0.1}, 1024e-8, 400, 200, 1024),
    "inpo-sdxl": ({"beta": 5000, "num_inference_steps": 10, "eta": 0.1}, 1024e-8, 400, 200, 1024),
    "smpo-sd15": ({"beta": 2000, "num_inference_steps": 5, **SMPO}, 1024e-8, 200, 100, 1024),
    "smpo-sdxl": ({"beta": 5000, "num_inference_steps": 10, **SMPO}, 1024e-8, 200, 100, 1024),
    "inversion-dpo-sdxl": (INVERSION, 1e-8, 2000, 1000, 1),
    # Of methods without a paper's full set of numbers:
    "sdpo-sd15": ({"beta": 5000, "safeguard": 0.9}, 2048e-8, 2000, 500, 2048),
    "sdpo-sdxl": ({"beta": 5000, "safeguard": 0.6}, 2048e-9, 2000, 500, 2048),
    "dmpo-sd15": ({"beta": 2000, "alpha": 0.01, "safeguard": 0.9}, 2048e-8, 2000, 500, 2048),
    "dspo-sd15": ({"beta": 0.001, "variant": "sd15"}, 2048e-8, 1500, 500, 2048),
    "dspo-sdxl": ({"beta": 5000, "variant": "sdxl"}, 2048e-8, 700, 200, 2048),
    "linear-dpo-sd15": ({"beta": 100, "eta": 1e-3, "reference": "ema", "reference_decay": 0.99}, 5e-6, 2000, 0, 128),
    "linear-dpo-sdxl": ({"beta": 500, "eta": 0, "reference": "frozen"}, 1e-5, 2000, 0, 128),
    "alpha-dpo-sdxl": ({"beta": 4000, "alpha": 0.9999, "dynamic": True}, 2048 * 8.192e-9, 600, 200, 2048),
    "poly-dpo-sd15": ({"alpha": 8}, 2048e-8, 2000, 500, 2048),
    "snpo-sd15": ({"beta": 2000, "loser_share": 0.9}, 2.048e-8, 3000, 0, 512),
    "mapo-sdxl": ({"beta": 0.1, "snr": 0.5}, 1e-5, 2000, 0, 16),
    "pnapo-sd3": ({"beta": 5000, "score_scale": 1, "decay_start": None}, 1e-6, 2000, 0, 32),
    "kto-sd15": ({"beta": 1000, "halo": "sigmoid", "baseline": "mean", "like_share": 0.8}, 1e-7, 20_000, 200, 8),
}


def test_every_preset_is_in_the_table() -> None:
    own = {f"mars-stage{stage}" for stage in (1, 2, 3)}  # unverified: tests/trainer/test_mars.py
    assert presets() == sorted({*PUBLISHED, *own})
    with pytest.raises(InvalidInput, match=r"preset = 'inpo-sd14'.*did you mean inpo-sd15"):
        load_config(preset="inpo-sd14")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_what_was_published(name: str) -> None:
    config = load_config(overrides=["data.path=pairs.parquet"], preset=name)
    method, found = config.method.name, vars(config.method)
    options, rate, steps, warmup, batch = PUBLISHED[name]
    assert method == re.sub(r"-(sd15|sd3|sdxl|sdxl-refiner|sdxl-turbo)$", "", name)
    assert {key: found[key] for key in options} == options
    scale = config.effective_batch() if config.optimizer.scale_lr else 1
    assert config.optimizer.learning_rate * scale == pytest.approx(rate)
    assert (config.training.steps, config.optimizer.warmup_steps, config.effective_batch()) == (steps, warmup, batch)
    assert config.data.resolution == (1024 if re.search(r"(sd3|sdxl(-refiner)?)$", name) else 512)
    # The scripts' default, 0.2, which the launch of SDXL-Turbo sets to 0; some methods' scripts drop none.
    undropped = name == "diffusion-dpo-sdxl-turbo" or method in ("inversion-dpo", "snpo", "mapo", "pnapo")
    assert config.data.caption_dropout == (0.0 if undropped else 0.2)
    if method in ("diffusion-dpo", "inpo", "smpo", "inversion-dpo"):
        assert found["utility"] == "sigmoid" and found["compat"] is None
        assert config.optimizer.learning_rate == 1e-8 and config.optimizer.scale_lr
        assert config.optimizer.lr_scheduler == "constant_with_warmup"
        assert config.optimizer.name == ("adamw" if name.endswith("sd15") else "adafactor")
        assert config.data.relabel_by_score == (method == "smpo"), "SmPO's winner is the image with the higher score"
        assert config.model.lora is None and config.model.init_perturbation == 0


def test_timesteps_of_turbo_and_refiner_are_those_of_the_released_script() -> None:
    """``t % 200`` for the refiner, ``250·(t % 4) + 249`` for Turbo, with t uniform over 1000."""
    turbo, refiner = (
        load_config(overrides=["data.path=x"], preset=f"diffusion-dpo-sdxl-{kind}") for kind in ("turbo", "refiner")
    )
    assert turbo.method.timesteps.values == sorted({250 * (t % 4) + 249 for t in range(1000)})  # type: ignore[union-attr]
    assert refiner.method.timesteps.range == [0, max(t % 200 for t in range(1000))]  # type: ignore[union-attr]
    assert turbo.model.zero_terminal_snr is True
