"""Trainer with ASAM against its loop written by hand, and everything that Trainer puts around a step."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from slow_reference import assert_near, assert_same, weights
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers_problem import Aware, InOrder, Watching, batches, by_hand, cross_entropy, network, sentences, trainer

from asam import ASAM, SAM, norm_parameters
from asam.integrations.transformers import SharpnessAwareTrainer


def smoothed(model, batch):
    logp = model(batch["input_ids"]).logits.log_softmax(-1)
    # Trainer takes the second sum in float32
    uniform = logp.sum(-1, dtype=torch.float32).mean() / 3
    return -(0.8 * logp.gather(1, batch["labels"][:, None]).mean() + 0.2 * uniform)


def squared(model, batch):
    return (model(batch["input_ids"]).logits - nn.functional.one_hot(batch["labels"], 3)).square().mean()


class OwnLoss(Aware):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        return squared(model, {"input_ids": inputs["input_ids"], "labels": labels})


class Translation(SharpnessAwareTrainer, InOrder, Seq2SeqTrainer):
    pass


def loss_func(outputs, labels, num_items_in_batch):
    return (outputs.logits - nn.functional.one_hot(labels, 3)).square().sum() / (3 * num_items_in_batch)


WAYS = {
    "plain": {},
    "SAM": {"asam": partial(SAM, rho=0.1)},
    "filterwise": {"asam": partial(ASAM, rho=0.3, normalization="filterwise", bias="fixed")},
    "norm parameters": {"asam": lambda model: ASAM(model, params=norm_parameters(model))},
    "clipping": {"options": {"max_grad_norm": 0.1}, "max_norm": 0.1},
    "label smoothing": {"options": {"label_smoothing_factor": 0.2}, "loss": smoothed},
    "compute_loss": {"kind": OwnLoss, "loss": squared, "options": {"gradient_accumulation_steps": 2}, "micro": 2},
    "compute_loss_func": {
        "more": {"compute_loss_func": loss_func},
        "loss": squared,
        "options": {"gradient_accumulation_steps": 2},
        "micro": 2,
    },
    "Seq2SeqTrainer": {"kind": Translation, "arguments": Seq2SeqTrainingArguments},
    "checkpointing, reentrant": {"checkpointing": {"use_reentrant": True}},
    "checkpointing": {"checkpointing": {"use_reentrant": False}},
}


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_those_of_the_loop_by_hand(way, tmp_path):
    case = {"asam": partial(ASAM, rho=0.5), "kind": Aware, "loss": cross_entropy, "micro": 1} | WAYS[way]
    model = network()
    reference = copy.deepcopy(model)
    if "checkpointing" in case:
        renamed = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)(
            case["checkpointing"]
        )
    more = {"asam": case["asam"]} | case.get("more", {})
    options = {"make": case["arguments"]} if "arguments" in case else {}
    trainer(tmp_path, model, kind=case["kind"], more=more, **options, **case.get("options", {})).train()
    micro, parts = case["micro"], batches(sentences())
    groups = [parts[i : i + micro] for i in range(0, 3 * micro, micro)]
    by_hand(reference, case["asam"](reference), groups, case["loss"], case.get("max_norm"))
    assert_near(weights(model), weights(reference), rtol=1e-10, atol=1e-12)


def test_micro_batches_are_weighted_by_their_tokens(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).double()
    reference = copy.deepcopy(model)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in sentences()]
    for i, row in enumerate(rows):
        row["labels"][: i % 4] = -100
    trainer(tmp_path, model, rows, gradient_accumulation_steps=2).train()

    asam, optimizer = ASAM(reference), torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for start in (0, 8, 16):
        count = sum((row["labels"][1:] != -100).sum() for row in rows[start : start + 8])
        for micro in (start, start + 4):
            ids, labels = (
                torch.stack([row[key] for row in rows[micro : micro + 4]]) for key in ("input_ids", "labels")
            )

            def loss(ids=ids, labels=labels, count=count):
                logits = reference(ids).logits[:, :-1].flatten(0, 1)
                return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / count

            asam.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    # the loss of the library is computed in float32
    assert_near(weights(model), weights(reference), rtol=1e-3, atol=1e-5)


def test_with_rho_0_it_is_trainer_bit_for_bit(tmp_path):
    one, other = network(dropout=0.1), network(dropout=0.1)
    trainer(tmp_path, one, kind=InOrder).train()
    watching = trainer(tmp_path, other, kind=Watching, more={"asam": partial(ASAM, rho=0)})
    watching.train()
    assert len(watching.seen) == 3
    assert_same(weights(other), weights(one))


def test_the_loss_at_w_is_logged_once(tmp_path):
    watching = trainer(tmp_path, network(), kind=Watching, logging_steps=1, logging_nan_inf_filter=False)
    watching.train()
    at_w = [loss for _, loss in watching.seen[::2]]
    at_the_perturbed = [loss for _, loss in watching.seen[1::2]]
    logged = [entry["loss"] for entry in watching.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert logged == pytest.approx(at_w, rel=1e-6)
    assert all(b > a for a, b in zip(at_w, at_the_perturbed, strict=True))


def test_evaluation_changes_nothing(tmp_path):
    one, other = network(), network()
    trainer(tmp_path, one).train()
    evaluating = trainer(tmp_path, other, more={"eval_dataset": sentences(8)}, eval_strategy="steps", eval_steps=1)
    evaluating.train()
    assert sum("eval_loss" in entry for entry in evaluating.state.log_history) == 3
    assert_same(weights(other), weights(one))


class Schedule(TrainerCallback):
    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.asam.rho = 0.1 * (4 - state.global_step)


def scheduled(folder, model, **options):
    schedule = Schedule()
    schedule.trainer = trainer(folder, model, more={"callbacks": [schedule]}, max_steps=4, **options)
    return schedule.trainer


def test_a_callback_sets_rho(tmp_path):
    model = network()
    reference = copy.deepcopy(model)
    training = scheduled(tmp_path, model)
    training.train()
    assert training.asam.rho == pytest.approx(0.1)
    asam, optimizer = ASAM(reference), torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for step, batch in enumerate(batches(sentences())[:4]):
        asam.rho = 0.1 * (4 - step)
        asam.backward(lambda batch=batch: cross_entropy(reference, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert_near(weights(model), weights(reference), rtol=1e-10, atol=1e-12)


def test_rho_set_before_training_is_kept(tmp_path):
    training = trainer(tmp_path, network())
    training.asam.rho = 0.25
    training.train()
    assert training.asam.rho == 0.25


def test_a_resumed_run_is_the_whole_one_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = network(dropout=0.2, dtype=torch.float32), network(dropout=0.2, dtype=torch.float32)
    scheduled(tmp_path, whole, **options).train()
    training = scheduled(tmp_path, resumed, **options)
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.state.global_step == 4
    assert_same(weights(resumed), weights(whole))


def test_bfloat16_autocast(tmp_path):
    model = network(dtype=torch.float32)
    reference = copy.deepcopy(model)
    trainer(tmp_path, model, bf16=True).train()

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"])

    by_hand(reference, ASAM(reference), [[batch] for batch in batches(sentences())[:3]], loss)
    for name, w in weights(model).items():
        torch.testing.assert_close(w, reference.get_parameter(name), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks so
def test_adapters_alone_are_perturbed(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(network(), config).double()
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    graded = Graded()
    watching = trainer(tmp_path, model, kind=Watching, more={"callbacks": [graded]})
    watching.train()
    # in the first step, the second factors are 0 and the first ones have no gradient
    (first, _), (second, _) = watching.seen[2:4]
    assert {name for name in first if not torch.equal(first[name], second[name])} == set(first) - frozen
    assert_same({n: w for n, w in weights(model).items() if n in frozen}, {n: first[n] for n in first if n in frozen})
    assert graded.names == set(first) - frozen


class Graded(TrainerCallback):
    """Notes which parameters have a gradient before an optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.names = {name for name, param in model.named_parameters() if param.grad is not None}


def test_a_model_of_each_training_is_perturbed(tmp_path):
    watching = trainer(tmp_path, None, kind=Watching, more={"model_init": lambda: network()}, max_steps=1)
    watching.train()
    first = watching.asam
    watching.train()
    assert watching.asam is not first
    for (_, at_w), (_, perturbed) in (watching.seen[:2], watching.seen[2:]):
        assert perturbed > at_w


def test_a_layer_replaced_between_trainings_is_perturbed(tmp_path):
    model = network()
    watching = trainer(tmp_path, model, kind=Watching, max_steps=1)
    watching.train()
    model.classifier = nn.Linear(16, 3).double()
    watching.optimizer = watching.lr_scheduler = None
    watching.train()
    at_w, perturbed = (w["classifier.weight"] for w, _ in watching.seen[2:])
    assert not torch.equal(at_w, perturbed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # those of torch's compiler
def test_torch_compile(tmp_path):
    model = network()
    reference = copy.deepcopy(model)
    trainer(tmp_path, model, torch_compile=True).train()
    by_hand(reference, ASAM(reference), [[batch] for batch in batches(sentences())[:3]])
    assert_near(weights(model), weights(reference), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_two_processes_are_one_that_has_both_shards(tmp_path):
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(here / "transformers_processes.py"), str(tmp_path)]
    result = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("same") == 2
