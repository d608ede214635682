# SPDX-License-Identifier: Apache-2.0
"""lm-eval runs tasks of its own through `ivg`, offline, on the bundled family."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from ivg_fast import (
    Engine,
    EngineConfig,
    InvalidParameterError,
    SearchParams,
    UnsupportedModelError,
)
from ivg_fast.assets import imdb_path
from ivg_fast.integrations.transformers import close_engines
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.value_head import load_value_model
from ivg_fast.prompts import derive_seed
from ivg_fast.training.data import test_prompts as review_prompts

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `lm-eval`")
from lm_eval.tasks import TaskManager  # noqa: E402

from ivg_fast.integrations.lm_eval import IVGLM, main  # noqa: E402

FAMILY = imdb_path()
GUIDES = f"tuned={FAMILY / 'tuned'},untuned={FAMILY / 'untuned'},value={FAMILY / 'value'}"
NUM_DOCS = 4
PROMPTS = review_prompts(NUM_DOCS)
GREEDY = {"until": ["."], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lm_eval") / "reviews.jsonl"
    rows = [{"text": prompt, "label": i % 2} for i, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def task(data: str, kind: str, **kwargs: Any) -> dict[str, Any]:
    common = {
        "task": f"reviews_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
    }
    own: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": [" was awful and boring", " was great"],
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "text": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": GREEDY,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    return common | own[kind] | kwargs


def run(data: str, kind: str, model: str, arguments: str, **kwargs: Any) -> Any:
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={FAMILY / 'base'}{arguments}",
        tasks=[task(data, kind, **kwargs)],
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )


def answers(result: Any) -> list[Any]:
    """What the model said to each request, in the order of the documents."""
    (samples,) = result["samples"].values()
    return [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]


def scores(result: Any) -> dict[str, Any]:
    (own,) = result["results"].values()
    return {k: v for k, v in own.items() if "," in k}


@pytest.mark.parametrize("kind", ["choice", "rolling", "text"])
def test_weight_zero_is_the_base_model_exactly(data: str, kind: str) -> None:
    stock = run(data, kind, "hf", "")
    ours = run(data, kind, "ivg", f",{GUIDES},guidance_weight=0.0")
    assert scores(ours) == scores(stock)
    assert answers(ours) == answers(stock)
    steered = run(data, kind, "ivg", f",{GUIDES},guidance_weight=2.0")
    assert answers(steered) != answers(stock), "the control: guidance does nothing"


@pytest.mark.parametrize("guidance", ["implicit", "explicit"])
def test_likelihoods_are_the_guided_ones(data: str, guidance: str) -> None:
    """Against float64, one text at a time."""
    weight = 0.7
    result = run(
        data,
        "choice",
        "ivg",
        f",{GUIDES},guidance={guidance},guidance_weight={weight},dtype=float32",
    )
    tokenizer = load_tokenizer(FAMILY / "base")
    models = {role: load_model(FAMILY / role).double() for role in ("base", "tuned", "untuned")}
    models["value"] = load_value_model(FAMILY / "value").double()
    choices = task(data, "choice")["doc_to_choice"]
    for prompt, resps in zip(PROMPTS, answers(result), strict=True):
        for choice, ((found, _),) in zip(choices, resps, strict=True):
            before = tokenizer(prompt).input_ids
            ids = tokenizer(prompt + choice).input_ids
            logits = {
                role: getattr(out, "logits", out)[0, len(before) - 1 : -1]
                for role, model in models.items()
                for out in [model(torch.tensor([ids]))]
            }
            tilt = logits["tuned"] - logits["untuned"]
            tilt = tilt if guidance == "implicit" else logits["value"]
            table = (logits["base"] + weight * tilt).log_softmax(-1)
            own = torch.tensor(ids[len(before) :])
            expected = table[torch.arange(len(own)), own].sum().item()
            assert float(found) == pytest.approx(expected, abs=2e-4)


def test_chunk_search_has_no_likelihood(data: str) -> None:
    arguments = f",{GUIDES},method=ivg,beam_width=2,num_candidates=2"
    for kind in ("choice", "rolling"):
        with pytest.raises(UnsupportedModelError, match="no likelihood"):
            run(data, kind, "ivg", arguments)
    with pytest.raises(InvalidParameterError, match="temperature"):  # the task is greedy
        run(data, "text", "ivg", arguments)


def test_text_is_the_engines(data: str) -> None:
    arguments = f",{GUIDES},method=ivg,beam_width=2,num_candidates=2,chunk_length=3"
    result = run(
        data,
        "text",
        "ivg",
        arguments + ",temperature=0.7,top_k=50,seed=5,num_blocks=300,dtype=float32",
    )
    params = SearchParams.ivg(
        max_tokens=12, beam_width=2, num_candidates=2, chunk_length=3, temperature=0.7, top_k=50,
        stop=["."],
    )  # fmt: skip
    roles = {role: FAMILY / role for role in ("tuned", "untuned", "value")}
    with Engine.from_pretrained(
        FAMILY / "base", **roles, config=EngineConfig(num_blocks=300)
    ) as engine:
        seeds = [derive_seed(5, i) for i in range(NUM_DOCS)]
        outputs = engine.generate(PROMPTS, params, seeds=seeds)
    assert [resp for ((resp,),) in answers(result)] == [o.outputs[0].text for o in outputs]


def test_a_task_that_samples_rules() -> None:
    model = IVGLM(str(FAMILY / "base"), temperature=0.7, top_k=9, device="cpu")
    own = model._params_of({"until": ["x"], "max_gen_toks": 3})
    assert (own.temperature, own.top_k, own.stop, own.max_tokens) == (0.7, 9, ("x",), 3)
    theirs = model._params_of({"do_sample": True, "temperature": 0.4, "top_p": 0.9})
    assert (theirs.temperature, theirs.top_p, theirs.top_k) == (0.4, 0.9, 9)
    assert theirs.max_tokens == model.max_gen_toks
    with pytest.raises(InvalidParameterError, match="repetition_penalty"):
        model._params_of({"repetition_penalty": 1.2})


def test_contexts_leave_room_for_the_guides() -> None:
    """A guide that reads less than the base, also where its weight is 0: the engine has it all the
    same."""
    size = load_model(FAMILY / "base").config.vocab_size
    config = GPT2Config(vocab_size=size, n_positions=24, n_embd=8, n_layer=1, n_head=1)
    guides = {role: GPT2LMHeadModel(config).eval() for role in ("tuned", "untuned")}
    lengths = []
    for weight in (1.0, 0.0):
        model = IVGLM(
            str(FAMILY / "base"), **guides, guidance_weight=weight, device="cpu", num_blocks=100
        )
        lengths.append(model.max_length)
        long = "I saw this film and " * 20
        request = SimpleNamespace(args=(long, {"until": [], "max_gen_toks": 4}))
        (text,) = model.generate_until([request], disable_tqdm=True)
        kept = model.tokenizer.decode(model.tokenizer(long).input_ids[-20:])
        request = SimpleNamespace(args=(kept, {"until": [], "max_gen_toks": 4}))
        assert model.generate_until([request], disable_tqdm=True) == [text]
    assert lengths[0] == 24 < lengths[1]


def test_refusals() -> None:
    base, tuned = str(FAMILY / "base"), str(FAMILY / "tuned")
    for arguments, name in (
        ({"tuned": tuned}, "untuned"),
        ({"method": "beam"}, "method"),
        ({"method": "eft"}, "guidance"),
        ({"guidance": "explicit"}, "guidance"),
        ({"guidance_weight": "much"}, "guidance_weight"),
    ):
        with pytest.raises(InvalidParameterError) as caught:
            IVGLM(base, device="cpu", **arguments)
        assert caught.value.parameter == name


def test_the_command_line_knows_it(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(task(data, "choice")), "utf-8")
    command = ["lm_eval", "run", "--model", "ivg"]
    command += ["--model_args", f"pretrained={FAMILY / 'base'},{GUIDES},guidance_weight=0.5"]
    command += ["--tasks", "reviews_choice", "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--limit", "2", "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert "acc,none" in json.loads(written.read_text("utf-8"))["results"]["reviews_choice"]


@pytest.fixture(autouse=True)
def _no_engine_left():
    yield
    close_engines()
