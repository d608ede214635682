# SPDX-License-Identifier: Apache-2.0
"""Templates and presets as the public models have them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    TEMPLATES,
    Engine,
    EngineConfig,
    InvalidParameterError,
    Prompt,
    SearchParams,
    Template,
    preset,
)
from ivg_fast.rendering import PromptRenderer
from ivg_fast.request import ROLES

PARAMS = SearchParams(max_tokens=3, seed=1)
CONFIG = EngineConfig(num_blocks=40)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer_of_all_bytes(*, bos: bool) -> Any:
    """A byte-level tokenizer, which also has the line breaks that the templates are made of."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:  # as Llama's: it begins every text by itself
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


# What the models read for the prompt "Hi {raw}", BOS as <s>.
SPELT = {
    "raw": "Hi {raw}",
    "imdb": "Here is a movie review from imdb: Hi {raw}",
    "tldr-base": "Hi {raw}\nTL;DR:",
    "tldr": "Hi {raw}TL;DR: ",
    "tulu": "<|user|>\nHi {raw}\n<|assistant|>\n",
    "llama-2-chat": "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nHi {raw} [/INST] ",
    "llama-2-ultra": "<s>[INST] Hi {raw} [/INST] ",
    "mistral-instruct": "<s>[INST] Hi {raw} [/INST]",
    "human-assitant": "<s>\n\nHuman: Hi {raw}\n\nAssitant:",
    "human-assistant": "<s>\n\nHuman: Hi {raw} \n\nAssistant: ",
}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", SPELT)
def test_named_templates(name: str, begins: bool) -> None:
    tokenizer = tokenizer_of_all_bytes(bos=begins)
    renderer = PromptRenderer({"base": tokenizer}, {"base": name})
    rendered = renderer.render("Hi {raw}", ["base"])["base"]
    wanted = SPELT[name]
    if TEMPLATES[name].add_bos is None and begins:  # the tokenizer's own habit
        wanted = "<s>" + wanted
    assert rendered.token_ids.tolist().count(0) == wanted.count("<s>")
    assert tokenizer.decode(rendered.token_ids) == wanted
    assert rendered.text == wanted.removeprefix("<s>")


def test_every_name_is_spelt_here() -> None:
    assert set(TEMPLATES) == {*SPELT, "chat"}


def test_a_text_that_begins_by_itself_has_one_begin_of_text() -> None:
    tokenizer = tokenizer_of_all_bytes(bos=True)
    renderer = PromptRenderer({"base": tokenizer}, {"base": Template("{raw}!", True)})
    assert renderer.render("<s>a", ["base"])["base"].token_ids.tolist().count(0) == 1


@pytest.mark.parametrize(
    ("name", "width", "children", "length", "max_tokens", "temperature", "top_k"),
    [
        ("imdb", 4, 4, 5, 50, 0.7, 0),
        ("tldr", 4, 4, 5, 128, 0.7, 0),
        ("tulu", 2, 2, 30, 2048, 0.7, 50),
        ("ultra", 2, 2, 30, 2048, 0.7, 50),
    ],
)
def test_presets(name, width, children, length, max_tokens, temperature, top_k) -> None:
    found = preset(name)
    p = found.params
    assert (p.beam_width, p.num_candidates, p.chunk_length) == (width, children, length)
    assert (p.max_tokens, p.temperature, p.top_k) == (max_tokens, temperature, top_k)
    assert (p.guidance, p.scorer, p.guidance_weight) == ("implicit", "explicit", 1.0)
    assert p.ignore_eos == (name == "imdb")
    assert p.stop == (("\n",) if name == "tldr" else ())
    assert found.max_length == (2048 if length == 30 else None)
    assert set(found.models) == set(found.templates) == set(ROLES)
    assert set(found.templates.values()) <= set(TEMPLATES)


def test_models_and_templates_of_presets() -> None:
    imdb = preset("imdb", base="gpt2-xl")
    assert imdb.models == {
        "base": "gpt2-xl",
        "tuned": "chadlzx/gpt2-imdb-dpo",
        "untuned": "lvwerra/gpt2-imdb",
        "value": "chadlzx/gpt2-imdb-token-rm",
    }
    assert imdb.templates == {"base": "imdb", "tuned": "raw", "untuned": "raw", "value": "raw"}
    tulu = preset("tulu", base="mistralai/Mistral-7B-Instruct-v0.2")
    assert tulu.templates["base"] == "mistral-instruct"
    assert tulu.templates["tuned"] == tulu.templates["untuned"] == "tulu"
    ultra = preset("ultra")
    assert ultra.templates["base"] == "llama-2-chat"
    assert ultra.templates["value"] == "human-assitant"
    assert ultra.models["untuned"] == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(InvalidParameterError, match=r"name must be one of .*, got 'alpaca'"):
        preset("alpaca")
    with pytest.raises(InvalidParameterError, match=r"base must be one of .*, got 'llama'"):
        preset("imdb", base="llama")


def test_the_imdb_preset_runs() -> None:
    found = preset("imdb")
    roles = {r: tiny_model("gpt2", seed=i) for i, r in enumerate(ROLES[:3])}
    with Engine(
        roles.pop("base"), tiny_tokenizer(), **roles, templates=found.templates, config=CONFIG
    ) as engine:
        params = SearchParams.eft(max_tokens=4, ignore_eos=True, seed=1)
        (output,) = engine.generate("I saw", params)
    assert output.prompt == "Here is a movie review from imdb: I saw"
    lens = output.stats.prefill_tokens
    assert lens["base"] > lens["tuned"] == lens["untuned"] > 0


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"format": "no slot"}, "format"),
        ({"format": "{raw} {raw}"}, "format"),
        ({"format": b"{raw}"}, "format"),
        ({"add_bos": 1}, "add_bos"),
        ({"format": None, "add_bos": True}, "add_bos"),
    ],
)
def test_bad_templates(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Template(**fields)
    assert caught.value.parameter == parameter
    assert caught.value.value == fields[parameter]


@pytest.mark.parametrize(
    ("prompt", "parameter"),
    [
        ({}, "raw"),
        ({"tuned": "a"}, "raw"),
        ({"raw": 5}, "prompts"),
        ({"raw": "a", "value": [1, "b"]}, "value"),
        ({"raw": "a", "untuned": {"role": "user"}}, "untuned"),
        ({"base": b"bytes"}, "base"),
    ],
)
def test_bad_prompt_objects(prompt: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Prompt(**prompt)
    assert caught.value.parameter == parameter


def test_a_prompt_keeps_what_it_was_given() -> None:
    ids, message = [1, 2], {"role": "user", "content": "a"}
    prompt = Prompt([message], base=ids)
    ids.append(3)
    message["content"] = "b"
    assert prompt == Prompt([{"role": "user", "content": "a"}], base=(1, 2))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "base_model": tiny_model("gpt2", seed=1),
        "tuned": tiny_model("gpt2", seed=2),
        "untuned": tiny_model("gpt2", seed=3),
    }


def chatting(form: str | None = CHAT) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = form
    return tokenizer


@pytest.fixture
def engine(models) -> Iterator[Engine]:
    """The tuned model's tokenizer has no chat template, the untuned one's has a template."""
    with Engine(
        **models,
        tokenizer=chatting(),
        tokenizers={"tuned": chatting(None), "untuned": chatting(None)},
        templates={"untuned": Template("[{raw}]")},
        config=CONFIG,
    ) as engine:
        yield engine
        assert engine.generate("still here", PARAMS)[0].outputs[0].token_ids


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([USER], "need a chat template in the tokenizer of tuned, or a template for tuned"),
        (Prompt([USER], tuned="a", untuned=[USER, USER]), "single message .* template of untuned"),
        (Prompt("a", untuned=[{"role": "system", "content": "a"}]), "single message of the user"),
        (Prompt("a", untuned=[{"role": "user", "content": None}]), "must have a text as its"),
        (Prompt(base="a", tuned="a"), "must have something for untuned"),
        (Prompt("a", untuned=""), "must have a token for untuned"),
        (Prompt("a", tuned=[97]), r"token ids of tuned, in \[0, 97\), got 97"),
        ("", "must have a token for base"),
    ],
)
def test_prompts_that_a_role_cannot_read(engine: Engine, prompt: Any, message: str) -> None:
    eft = SearchParams.eft(max_tokens=3)
    with pytest.raises(InvalidParameterError, match=message) as caught:
        engine.generate(["a", prompt], eft)
    assert caught.value.parameter == "prompts"


def test_a_role_that_takes_no_part_needs_no_prompt(engine: Engine) -> None:
    for prompt in ([USER], Prompt(base="a")):
        assert engine.generate(prompt, PARAMS)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": {"tuned": "alpaca"}}, r"templates\['tuned'\] must be .*, got 'alpaca'"),
        ({"templates": {"judge": "raw"}}, "templates must be for a role .*, got 'judge'"),
        ({"templates": "raw"}, "templates must be templates by role, got 'raw'"),
        ({"templates": {"tuned": "chat"}}, r"\['tuned'\] needs a tokenizer of tuned that has a ch"),
        ({"tokenizer": None, "templates": {"base": "raw"}}, "needs a tokenizer of base, got 'raw'"),
        ({"tokenizers": {"base": chatting()}}, "tokenizers must be for a role .*, got 'base'"),
        ({"tokenizers": [chatting()]}, "tokenizers must be tokenizers by role"),
    ],
)
def test_bad_engine_arguments(models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        Engine(**models, **{"tokenizer": tiny_tokenizer(), "config": CONFIG, **options})


def test_a_template_needs_a_begin_of_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InvalidParameterError, match=r"templates\['base'\] .* begin-of-text token"):
        PromptRenderer({"base": tokenizer}, {"base": "mistral-instruct"})


def test_tokenizers_of_other_pieces_are_refused(models) -> None:
    from ivg_fast import VocabularyMismatchError

    other = tiny_tokenizer()
    swapped = (
        other.backend_tokenizer.to_str().replace('"a":65', '"a":66').replace('"b":66', '"b":65')
    )
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped))
    with pytest.raises(VocabularyMismatchError, match=r"token id 65 is 'a' .* but 'b' in tuned"):
        Engine(**models, tokenizer=tiny_tokenizer(), tokenizers={"tuned": other}, config=CONFIG)
