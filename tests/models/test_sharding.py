"""Compare a student and teacher sharded on two gloo ranks with the whole models (pitfall 20)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.divergence import generalized_jsd
from gkd_lab.models.forward import Sequences, compute_completion_logits
from gkd_lab.models.heads import OutputHead, mark_untied_head
from gkd_lab.models.loading import use_on_device
from gkd_lab.models.sharding import place_student, place_teacher, shard_model

from .tiny import FAMILIES, FIRST_WORD, LAST_WORD, tiny_model, tiny_tokenizer

RANKS, ROWS = 2, 4
CONFIGURATIONS = Path(__file__).parents[2] / "docs" / "accelerate"
Facts = dict[str, Any]


def make_student(family: Family) -> PreTrainedModel:
    return tiny_model(family, 1)


def make_teacher(family: Family) -> PreTrainedModel:
    return tiny_model(family, 2, width=32).eval().requires_grad_(False)


def batch() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(FIRST_WORD, LAST_WORD + 1, (RANKS * ROWS, length), generator=generator)
        for length in (5, 6)
    )
    mask = torch.ones_like(completions).tril(diagonal=1)
    return Sequences(prompts, torch.ones_like(prompts), completions, mask)


def compute_loss(student: nn.Module, teacher_logits: Tensor, rows: Sequences) -> Tensor:
    """Sum over the rows' tokens, so that the ranks' losses add up to that of the whole batch."""
    losses = generalized_jsd(compute_completion_logits(student, rows), teacher_logits, 0.5)  # type: ignore[arg-type]
    return (losses * rows.completion_mask).sum()


class Unhooked(nn.Module):
    """Calls `model.forward` itself, like code that runs within the model's forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.model = model.config, model

    def forward(self, **inputs: Any) -> Any:
        return self.model.forward(**inputs)


# ---- two ranks; each writes its measurements for the tests below ----


def ranks_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    accelerator = Accelerator(cpu=True)
    facts: Facts = {"kept whole": whole_teacher(accelerator)}
    for family in FAMILIES:
        choose_fsdp(accelerator)
        facts[family] = {
            "step": step(family, rank),
            "redirected": [redirected_step(family, rank, reshard) for reshard in (True, False)],
            "placed": placed(family, rank, accelerator),
            "received": received(family, rank),
            "written": written(family, rank),
        }
        choose_fsdp(accelerator)
        facts[family]["trained"] = trained(family, rank, accelerator)
    torch.save(facts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def choose_fsdp(accelerator: Accelerator) -> None:
    """Make an accelerator choose FSDP on a CPU, which it never does by itself."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP


def part(rank: int) -> Sequences:
    return batch().map_tensors(lambda tensor: tensor[rank * ROWS : (rank + 1) * ROWS])


def step(family: Family, rank: int) -> Facts:
    """Compute loss and gradients of a sharded pair, gathered from the ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    student, teacher = shard_model(make_student(family), mesh), shard_model(make_teacher(family), mesh)
    pieces = all(isinstance(p, DTensor) for m in (student, teacher) for p in m.parameters())
    with torch.no_grad():
        logits = compute_completion_logits(teacher, part(rank))
    return {
        "pieces": pieces,
        "logits": logits,
        **backward(student, compute_loss(student, logits, part(rank))),
    }


def backward(student: nn.Module, loss: Tensor) -> Facts:
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    # FSDP averages over ranks; the loss is a sum.
    gradients = {name: whole(p.grad) * RANKS for name, p in student.named_parameters()}
    return {"loss": total, "gradients": gradients}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def redirected_step(family: Family, rank: int, reshard: bool) -> Facts:
    """Compute the loss within the student's forward pass, with its head as a tensor."""
    from trl.models.utils import _ForwardRedirection

    mesh = init_device_mesh("cpu", (RANKS,))
    student, teacher = shard_model(make_student(family), mesh, reshard_root=reshard), make_teacher(family)
    seen: list[Tensor] = []

    def inside(rows: Sequences) -> Tensor:
        loss = compute_loss(Unhooked(student), compute_completion_logits(teacher, rows), rows)  # type: ignore[arg-type]
        head = student.get_output_embeddings().weight
        seen.append(head.detach().clone())
        return loss + head.sum()  # a gradient that reaches the head by itself

    loss = _ForwardRedirection()(student, student, inside, part(rank))
    return {"head": type(seen[0]) is Tensor and seen[0], **backward(student, loss)}


def placed(family: Family, rank: int, accelerator: Accelerator) -> Facts:
    """Place a teacher under FSDP2, and read its head before the end of `use_on_device`."""
    teacher = make_teacher(family)
    same = place_teacher(teacher, accelerator) is teacher
    kinds = [kind_of_head(teacher)]
    with use_on_device(teacher, "cpu", parked=False):
        with torch.no_grad():
            logits = compute_completion_logits(teacher, part(rank))
        kinds.append(kind_of_head(teacher))
    kinds.append(kind_of_head(teacher))
    local = sum(p.to_local().numel() for p in teacher.parameters() if isinstance(p, DTensor))
    return {"same": same, "head": kinds, "logits": logits, "weights": local}


def kind_of_head(model: PreTrainedModel) -> str:
    return type(model.get_output_embeddings().weight).__name__


def received(family: Family, rank: int) -> Tensor:
    """Shard a model whose rank 1 starts without weights, as after `cpu_ram_efficient_loading`."""
    teacher = make_teacher(family)
    if rank > 0:
        for module in teacher.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    shard_model(teacher, init_device_mesh("cpu", (RANKS,)), broadcast_weights=True)
    with torch.no_grad():
        return compute_completion_logits(teacher, part(rank))


def written(family: Family, rank: int) -> Tensor:
    """Generate greedily with a sharded model; the ranks may stop at different steps."""
    model = shard_model(make_teacher(family), init_device_mesh("cpu", (RANKS,)))
    return greedy(model, rank)


def greedy(model: PreTrainedModel, rank: int) -> Tensor:
    rows = part(rank)
    return model.generate(
        input_ids=rows.prompt_ids,
        attention_mask=rows.prompt_mask,
        max_new_tokens=6 if rank == 0 else 3,
        eos_token_id=None,
        do_sample=False,
    )


def trained(family: Family, rank: int, accelerator: Accelerator) -> dict[str, Tensor]:
    """Take an optimizer step with a student after `place_student` and `accelerator.prepare`."""
    student, teacher = place_student(make_student(family), accelerator), make_teacher(family)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student, optimizer = accelerator.prepare(student, optimizer)
    compute_loss(student, compute_completion_logits(teacher, part(rank)), part(rank)).backward()
    optimizer.step()
    return {name: whole(p.detach()) for name, p in student.named_parameters()}


def whole_teacher(accelerator: Accelerator) -> Facts:
    teacher = make_teacher("decoder-only")
    same = place_teacher(teacher, accelerator) is teacher
    return {"kind": str(accelerator.distributed_type), "same": same, "type": type(teacher).__name__}


# ---- tests of two ranks ----


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    """Measurements of rank 0 and rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def whole_step(family: Family, *, head_sum: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute loss and gradients of the unsharded pair on the whole batch."""
    student = make_student(family)
    loss = compute_loss(student, compute_completion_logits(make_teacher(family), batch()), batch())
    loss = loss + head_sum * student.get_output_embeddings().weight.sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_pair_has_the_loss_and_gradients_of_the_whole_one(
    facts: list[Facts], family: Family
) -> None:
    loss, gradients = whole_step(family)
    for rank, measured in enumerate(fact[family]["step"] for fact in facts):
        assert measured["pieces"]
        close(measured["logits"], compute_completion_logits(make_teacher(family), part(rank)))
        close(measured["loss"], loss)
        close(measured["gradients"], gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reshard", [True, False])
def test_within_the_forward_pass_the_head_is_whole_and_its_gradient_arrives(
    facts: list[Facts], family: Family, reshard: bool
) -> None:
    loss, gradients = whole_step(family, head_sum=RANKS)
    for measured in (fact[family]["redirected"][0 if reshard else 1] for fact in facts):
        close(measured["head"], make_student(family).get_output_embeddings().weight.detach())
        close(measured["loss"], loss)
        close(measured["gradients"], gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_20_a_teacher_under_fsdp_is_sharded_and_gathers_its_head_only_while_it_is_used(
    facts: list[Facts], family: Family
) -> None:
    size = sum(p.numel() for p in make_teacher(family).parameters())
    for rank, measured in enumerate(fact[family]["placed"] for fact in facts):
        assert measured["same"] and measured["head"] == ["DTensor", "Parameter", "DTensor"]
        assert measured["weights"] == pytest.approx(size / RANKS, rel=0.02)
        close(measured["logits"], compute_completion_logits(make_teacher(family), part(rank)))


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_without_weights_get_those_of_the_first(facts: list[Facts], family: Family) -> None:
    for rank, fact in enumerate(facts):
        close(fact[family]["received"], compute_completion_logits(make_teacher(family), part(rank)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_model_generates_the_tokens_of_the_whole_one(facts: list[Facts], family: Family) -> None:
    for rank, fact in enumerate(facts):
        wanted = greedy(make_teacher(family), rank)
        # Where ranks stop at different steps transformers keeps the early one going; the rest is cut off.
        assert torch.equal(fact[family]["written"][:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_trains_a_sharded_student_of_either_family(facts: list[Facts], family: Family) -> None:
    _, gradients = whole_step(family)
    for fact in facts:
        for name, parameter in make_student(family).named_parameters():
            close(fact[family]["trained"][name], parameter.detach() - 0.1 * gradients[name] / RANKS)


def test_without_fsdp_every_rank_has_a_whole_teacher_that_nothing_wraps(facts: list[Facts]) -> None:
    for fact in facts:
        assert fact["kept whole"] == {
            "kind": "DistributedType.MULTI_CPU",
            "same": True,
            "type": "LlamaForCausalLM",
        }


# ---- one process ----


def test_a_teacher_is_placed_on_the_device_without_the_accelerator_preparing_it() -> None:
    accelerator, teacher = Accelerator(cpu=True), make_teacher("decoder-only")
    forward = teacher.forward
    assert place_teacher(teacher, accelerator) is teacher
    assert teacher.forward == forward and accelerator._models == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_and_its_hooks_are_not_called_where_the_loss_reads_it(family: Family) -> None:
    """ZeRO-3's hooks would expect a gradient through the head's output."""
    model, calls = make_student(family), []
    head, module = OutputHead(model), model.get_output_embeddings()
    module.register_forward_hook(lambda *_: calls.append(1))
    hidden = head.compute_unprojected(part(0)).hidden
    assert not calls and model.get_output_embeddings() is module
    close(hidden @ module.weight.T, compute_completion_logits(model, part(0)))


def test_a_model_without_known_blocks_is_not_sharded_as_one_piece() -> None:
    with pytest.raises(ValueError, match=r"\['GPT2Block'\].*cls_to_wrap"):
        shard_model(make_teacher("decoder-only"), None, blocks={"GPT2Block"})  # type: ignore[arg-type]


def test_unsupported_placements_are_refused_with_advice() -> None:
    old = FullyShardedDataParallelPlugin(fsdp_version=1)
    state = SimpleNamespace(fsdp_plugin=old)
    fsdp_1: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False, state=state)
    deepspeed: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    quantized = make_teacher("decoder-only")
    quantized.config.quantization_config = {"load_in_8bit": True}
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("fsdp_version: 2", lambda: place_teacher(make_teacher("decoder-only"), fsdp_1)),
        ("offload_param", lambda: place_teacher(make_teacher("decoder-only"), deepspeed, parked=True)),
        ("quantized teacher", lambda: place_teacher(quantized, Accelerator(cpu=True), parked=True)),
    ]
    for message, attempt in refused:
        with pytest.raises(ValueError, match=message):
            attempt()


# ---- the configuration files, and on a GPU the Trainer with them ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
        ("deepspeed_zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_each_configuration_file(name: str, kind: DistributedType) -> None:
    assert load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml")).distributed_type == kind


def launch(folder: Path, name: str) -> Facts:
    """Run `launched.py` with a configuration file, or in one process without, and read its measurements."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = [sys.executable]
    if name == "alone":
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        processes = min(torch.cuda.device_count(), RANKS) if torch.cuda.is_available() else RANKS
        file = str(CONFIGURATIONS / f"{name}.yaml")
        started += ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
        started += ["--num_processes", str(processes), "--mixed_precision", "no"]
    out = folder / f"{name}.json"
    script = str(Path(__file__).with_name("launched.py"))
    subprocess.run([*started, script, str(folder), str(out)], env=environment, check=True)
    return json.loads(out.read_text())


def save_pair(folder: Path, family: Family, *, tied: bool) -> None:
    """Save a student and a teacher; untied heads differ from the embeddings."""
    for role, seed, width in (("student", 1, 16), ("teacher", 2, 32)):
        model = tiny_model(family, seed, width=width, dtype=torch.float32)
        if not tied:
            weight = model.get_input_embeddings().weight.detach()
            torch.manual_seed(seed)
            model.get_output_embeddings().weight = nn.Parameter(weight + 0.3 * torch.randn_like(weight))
            mark_untied_head(model)
        model.save_pretrained(folder / role)
        tiny_tokenizer().save_pretrained(folder / role)


def assert_same_course(measured: Facts, alone: Facts, tolerance: float) -> None:
    """Compare the losses of four steps, of two steps after resuming, and of the evaluation."""
    for name in ("losses", "resumed", "evaluation"):
        assert measured[name] == pytest.approx(alone[name], rel=tolerance)
    assert alone["resumed"] == alone["losses"]


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install gkd-lab[deepspeed]",
)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the next test starts DeepSpeed on it")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "tied"), [("deepspeed_zero2", False), ("deepspeed_zero3", False), ("deepspeed_zero3", True)]
)
def test_two_processes_under_deepspeed_have_the_losses_of_one(
    name: str, tied: bool, family: Family, tmp_path: Path
) -> None:
    save_pair(tmp_path, family, tied=tied)
    alone, measured = launch(tmp_path, "alone"), launch(tmp_path, name)
    assert measured["empty"] == [name == "deepspeed_zero3"]
    assert_same_course(measured, alone, 1e-5)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate shards on CUDA devices only")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "fsdp2",
        pytest.param("deepspeed_zero2", marks=needs_deepspeed),
        pytest.param("deepspeed_zero3", marks=needs_deepspeed),
    ],
)
def test_the_trainer_learns_the_same_under_each_configuration(
    name: str, family: Family, tmp_path: Path
) -> None:
    save_pair(tmp_path, family, tied=True)
    alone, measured = launch(tmp_path, "alone"), launch(tmp_path, name)
    assert measured["device"] == ["cuda"]
    assert name != "fsdp2" or measured["pieces"] == ["DTensor"]
    assert_same_course(measured, alone, 1e-3)
