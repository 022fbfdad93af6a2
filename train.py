"""Train one network on several tasks at once.

    python train.py --tasks cls seg                        # on drawn photographs: nothing to download
    python train.py --tasks cls seg --data PATH/TO/IDRiD   # on the real ones
    torchrun --nproc_per_node=2 train.py --tasks cls seg   # in several processes
    python train.py --resume runs/NAME                     # go on where it was stopped

Read Config for the options, then train_step for one step and fit for the loop around it. A run leaves config.json,
log.jsonl (a line per epoch), best.pt (the best epoch on validation), last.pt and result.json in runs/NAME.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import model
from evaluate import load_run
from model import ENCODERS, MOE_PLACES, ROUTERS, Net, load_balancing_loss
from retina.datasets.splits import describe_split, telling_tasks
from retina.evaluation import routing, scoring, tables
from retina.evaluation.compare import calibration_line
from retina.files import load_tensors, run_cli
from retina.inference.full_size import score_at_full_size
from retina.training import checkpoint, distillation, distributed, precision, pretrained
from retina.training.checkpoint import RunFolder, TrainState
from retina.training.config import as_dict, check_world, flag, parse, read_loss_weights, read_request, read_same, \
    resolve_defaults
from retina.training.diagnostics import LossMonitor, describe_run
from retina.training.distillation import Lesson, Teachers
from retina.training.distributed import SINGLE_PROCESS, World
from retina.training.interrupt import StopSignal, explain_failures, stopped_by_sigterm
from tasks import TASKS, Task, build_net, make_tasks


# ---- configuration: a field is a flag ----

PUBLISHED = 0.3  # of the learning rate, for what starts from published weights; docs/results.md has what was tried
WHAT, TEACHERS, NETWORK, TRAINING, MACHINE = ("what is learned from what", "teachers", "network", "training",
                                               "machine")


@dataclass(frozen=True)
class Config:
    """All that determines a run, as numbers, strings and tuples; stored in config.json and in every checkpoint."""
    tasks: tuple[str, ...] = flag(("cls", "seg"), WHAT, f"any of {' '.join(TASKS)}", choices=TASKS.keys())
    data: str | None = flag(None, WHAT, "IDRiD's folder, a table FILE.csv, or a folder with train/CLASS/ in it; see "
                            "README", default_text="data/IDRiD if it exists, else drawn photographs")
    image_size: int = flag(128, WHAT, "side of the square that the network sees", real=256, lowest=64, multiple=32)
    fold: str = flag("1/5", WHAT, "I/N: validate on fold I of N of the training split")
    crops: float = flag(1.0, WHAT, "every second time, a photograph with masks is a part of itself at this many times "
                        "the size, in which small lesions are larger", real=2.0, lowest=1, below=8)
    keep_leaks: bool = flag(False, WHAT, "train on photographs of eyes in the test split too, as most of the "
                            "literature does")
    teachers: tuple[str, ...] = flag((), TEACHERS, "runs whose answers are learned, too, for the tasks that they have")
    unlabelled: str | None = flag(None, TEACHERS, "folder of photographs without labels, for which teachers answer")
    labelled: float = flag(1.0, TEACHERS, "share of the eyes of training that keep their labels, always the same ones; "
                           "teachers answer for the others", lowest=1e-6, highest=1)
    temperature: float = flag(2.0, TEACHERS, "makes probabilities of classes and words softer; 1: as they are",
                              lowest=1e-3)
    distil_weight: float = flag(1.0, TEACHERS, "of teachers' answers beside labels", lowest=0)
    anneal: bool = flag(False, TEACHERS, "of photographs with labels, these count ever more and teachers ever less")
    epochs: int = flag(5, TRAINING, "at most", real=11, lowest=1)
    batch_size: int = flag(8, TRAINING, "photographs in a step", lowest=2)
    lr: float = flag(2.5e-3, TRAINING, f"highest learning rate of AdamW; {PUBLISHED} of it for published weights",
                     lowest=1e-12)
    weight_decay: float = flag(0.01, TRAINING, "of AdamW", lowest=0)
    patience: int = flag(20, TRAINING, "epochs to wait for a better validation score", lowest=1)
    loss_weights: tuple[str, ...] = flag(("fixed",), TRAINING, "fixed, uncertainty, or pairs like cls=0.5 seg=1")
    augment: bool = flag(True, TRAINING, "train on every photograph as it is")
    flips: bool = flag(True, TRAINING, "no mirror images: for labels that tell left from right or up from down")
    seed: int = flag(0, TRAINING, "of the weights and everything random", lowest=0, below=1 << 32)
    encoder: str = flag("b0", NETWORK, f"EfficientNet variant, {' '.join(ENCODERS)}", choices=ENCODERS.keys(),
                        default_text="b0; on real data lite0 where only its ImageNet weights can be had")
    encoder_weights: str = flag("none", NETWORK, "none, imagenet, or a file with a torchvision state dict",
                                default_text="none for drawn photographs, else imagenet if it can be had")
    num_experts: int = flag(8, NETWORK, "in the expert layer; 0: no layer", default_text="8; private: tasks x top-k",
                            lowest=0)
    top_k: int = flag(2, NETWORK, "experts that each token is sent to", default_text="2; uniform: all", lowest=1)
    router: str = flag("learned", NETWORK, "", choices=ROUTERS)
    expert_ratio: float = flag(0.5, NETWORK, "hidden units of an expert, in multiples of the map's channels",
                               lowest=1e-3)
    moe_at: str = flag("bottleneck", NETWORK, "the layer's place: the bottleneck, or the decoder's at stride 4, "
                       "which all tasks then share up to there", choices=MOE_PLACES.keys())
    balance_weight: float = flag(0.01, NETWORK, "weight of the load-balancing loss",
                                 default_text="0.01 for routers that learn", lowest=0)
    precision: str = flag("fp32", MACHINE, f"of the passes through the network, {' '.join(precision.DTYPES)}",
                          default_text="bf16 where the device has units for it, fp16 on older GPUs, else fp32",
                          choices=precision.DTYPES.keys())
    workers: int = flag(0, MACHINE, "processes that load photographs", default_text="0 on CPU, else up to 8", lowest=0)
    device: str = flag("auto", MACHINE, "auto, cpu or cuda; auto: the GPU if there is one",
                       choices=("auto", "cpu", "cuda"))
    deterministic: bool = flag(False, MACHINE, "on a GPU: the same weights every time, more slowly; a CPU always does")
    # no flags: the data set or the comparison decides these
    # label -> names of the data set's own classes or signs, words of its training split
    names: dict[str, list[str]] = field(default_factory=dict, hash=False)
    text_decoder: str = "transformer"
    expert_dropout: float = 0.1
    # five epochs of drawings are too short to overfit
    stochastic_depth: float = field(default=0.05, metadata={"real": 0.1})
    log_gradients: bool = False  # log the cosines of the tasks' gradients at eight steps of each epoch
    ignore_eyes: bool = False  # split as if each photograph showed an eye of its own
    sampling_tasks: tuple[str, ...] = ()  # photographs are sampled for these tasks, of which only some are trained


# ---- the loss of several tasks ----

class LossWeights(nn.Module):
    """Sum the tasks' losses, with fixed or learned weights; the loss of a task is that of its labels and teachers.

    "uncertainty" learns s_t = log sigma_t^2 in L = sum_t exp(-s_t) L_t + s_t (Kendall et al. 2018, arXiv 1705.07115,
    eq. 10; the factors 1/2 that differ between regression and classification are left out). A task that is not in
    `losses` adds neither its loss nor its s_t. "balance" is added with `balance_weight`.
    """

    def __init__(self, tasks: Sequence[Task], words: Sequence[str], balance_weight: float):
        super().__init__()
        read = read_loss_weights(words, [t.name for t in tasks])
        self.learned, self.balance_weight = read is None, balance_weight
        self.fixed = {t.name: t.weight for t in tasks} | (read or {})
        self.log_variance = nn.ParameterDict({t.name: nn.Parameter(torch.zeros(())) for t in tasks} if self.learned
                                             else {})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        by_task: dict[str, Tensor] = {}
        for name, loss in losses.items():
            if name != "balance":
                task, *_ = name.split()  # "cls teachers" is one more part of the loss of cls
                by_task[task] = by_task[task] + loss if task in by_task else loss
        if self.learned:
            total = sum((-self.log_variance[t]).exp() * loss + self.log_variance[t] for t, loss in by_task.items())
        else:
            total = sum(self.fixed[t] * loss for t, loss in by_task.items())
        return total + self.balance_weight * losses["balance"] if "balance" in losses else total


def task_losses(state: TrainState, batch: data.Batch, tasks: Sequence[Task], config: Config,
                world: World = SINGLE_PROCESS, teachers: Teachers | None = None) -> dict[str, Tensor]:
    """The loss of each task over its labelled photographs, and "balance"; always those of the whole batch.

    With teachers also "cls teachers", how far the student's answers for `cls` are from theirs.
    """
    lesson = teachers.prepare(batch, config.precision) if teachers else Lesson(batch.indices, batch.targets)
    with precision.autocast(state.device, config.precision):
        outputs, routed = state.model(batch.images, lesson.indices, lesson.targets)
    dtype = next(state.net.parameters()).dtype  # float32, whatever the precision of the pass
    losses = {}
    for t in (t for t in tasks if t.name in outputs):
        output = outputs[t.name].to(dtype)
        labelled = output[lesson.labelled[t.name]] if t.name in lesson.labelled else output
        losses[t.name] = t.loss(labelled, batch.targets[t.name], world.all_reduce_sum)
        if t.name in lesson.answers:
            trust = teachers.trust_in_labels(state.step)
            losses[t.name] = trust * losses[t.name]
            losses[f"{t.name} teachers"] = teachers.loss(t, output, lesson, trust, world.all_reduce_sum)
    return losses | ({"balance": load_balancing_loss(routed, world.all_reduce_sum)} if routed else {})


# ---- one step ----

def train_step(state: TrainState, batch: data.Batch, tasks: Sequence[Task], config: Config,
               world: World = SINGLE_PROCESS, teachers: Teachers | None = None) -> dict[str, float]:
    """Learn from one batch; -> its losses (on a GPU, those of the step before). RunError: see LossMonitor.check."""
    losses = task_losses(state, batch, tasks, config, world, teachers)
    if config.log_gradients:
        state.monitor.compare_gradients(losses, state.net.encoder)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(state.loss_weights(losses)).backward()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    logged = state.monitor.record(state.step + 1, losses, norm)
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.schedule.step()
    state.step += 1
    return logged


def make_state(net: Net, tasks: Sequence[Task], config: Config, steps: int, device: torch.device,
               world: World = SINGLE_PROCESS) -> TrainState:
    """A network and what trains it for so many steps: AdamW, linear warm-up, then a cosine to zero.

    What started from published weights learns at PUBLISHED of the rate: it has less far to go than the rest.
    """
    net.to(device)
    parallel = distributed.parallelize(net, world, device)
    loss_weights = LossWeights(tasks, config.loss_weights, config.balance_weight).to(device)
    encoder, layers = pretrained.published_layers(net)
    published = {p for m in (encoder, *layers) for p in m.parameters()} if config.encoder_weights != "none" else set()
    # weight decay on matrices and kernels only: on norms and biases it merely fights the data
    groups = [{"params": [p for p in net.parameters() if (p in published) == slow and (p.ndim > 1) == matrix],
               "weight_decay": config.weight_decay * matrix, "lr": config.lr * (PUBLISHED if slow else 1)}
              for slow in (False, True) for matrix in (True, False)]
    groups.append({"params": list(loss_weights.parameters()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], config.lr, fused=True)
    warmup = max(1, min(steps // 10, 200))

    def factor(step):
        angle = math.pi * (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(angle)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return TrainState(net, parallel, loss_weights, optimizer, schedule, scaler,
                      LossMonitor(net, scaler, device, config.lr, steps // config.epochs))


# ---- the loop ----

def fit(config: Config, folder: Path, notes: Sequence[str] = (), resume: bool = False, overwrite: bool = False,
        quiet: bool = False, world: World = SINGLE_PROCESS) -> dict:
    """Train as `config` says and write everything to `folder`; -> what result.json holds.

    With `resume`, the run in `folder` goes on from its last.pt and ends as if it had never been stopped. InputError:
    data or configuration cannot be used, or a file was removed during training. RunError: a loss is not finite (see
    LossMonitor.check), no epoch answered with finite numbers, a process was lost, memory ran out.
    """
    check_world(config, world)
    quiet = quiet or world.rank > 0
    device = world.device(precision.pick_device(config.device))
    checkpoint.make_repeatable(config.seed, device.type == "cpu" or config.deterministic)
    runs = distillation.load_teachers(load_run, config, device)
    with world.main_process_first():
        train_set, val_set, findings = data.load_datasets(config, make_tasks(config.tasks, config.names))
    config = replace(config, names=findings.pop("names") | distillation.words_of(runs))
    saved = read_same(folder, config) if resume else None
    net, tasks = build_net(asdict(config))
    distillation.check_teachers(runs, tasks, config.names, findings.pop("judged"))
    if saved is None and world.rank == 0:  # the other processes take over its weights
        pretrained.start_from(net, config.encoder_weights, config.encoder)
    telling = telling_tasks(findings["counts"], tasks)
    if not quiet:
        print(describe_split(train_set.records, val_set.records, findings, tasks, config))
    sampler = data.MultiTaskBatchSampler(train_set.records, make_tasks(config.sampling_tasks, config.names) or tasks,
                                         config.batch_size, config.seed, config.augment, tasks, config.crops > 1,
                                         bool(config.teachers))
    steps = config.epochs * sampler.per_epoch
    with explain_failures(folder, config, world) as failure, StopSignal(world) as stop:
        state = failure.state = make_state(net, tasks, config, steps, device, world)
        teachers = Teachers(runs, tasks, config, steps) if runs else None
        run = RunFolder(folder, as_dict(config), state, train_set, val_set, world, quiet,
                        {"learned": distillation.learned_by(train_set.records, runs),
                         "teachers": [checkpoint.weights_hash(run.net) for run in runs]})
        run.open(saved, {**findings, "notes": [*notes, *findings["notes"]]}, resume, overwrite)
        failure.begun = True
        batches = data.train_loader(train_set, sampler.range(state.step, steps, world.rank, world.size), tasks, device,
                                    config.workers, data.make_empty_targets(train_set, tasks) if world.size > 1 else {})
        run.start(saved)  # after the loader, which draws from torch's generator
        while not run.ended():
            net.train()
            left = (state.epoch + 1) * sampler.per_epoch - state.step
            for batch in run.progress(islice(batches, left), left, sampler.per_epoch):
                if stop.agree(device, run.due()):
                    break
                if stop.due:
                    run.save_last()
                with state.monitor.working():
                    train_step(state, batch, tasks, config, world, teachers)
            run.save_last()
            if stop.agree(device):
                raise KeyboardInterrupt
            val_batches = data.eval_loader(val_set, tasks, config.batch_size, world)
            scores = scoring.evaluate_split(net, val_batches, tasks, world=world, strict=False)
            run.end_epoch(scores, tasks, telling, sampler.photographs_in(state.epoch))
        result = run.finish()
        if sampler.crops and world.rank == 0:
            calibrate_in_tiles(folder, net, tasks, val_set, config)
        return result


def calibrate_in_tiles(folder: Path, net: Net, tasks: Sequence[Task], val_set: data.FundusDataset,
                       config: Config) -> None:
    """Fit the thresholds of masks in best.pt to answers in tiles as well, and say there that it answers so."""
    best = load_tensors(folder / "best.pt")
    net.load_state_dict(best["net"])
    device = next(net.parameters()).device
    if scores := score_at_full_size(net, tasks, val_set.records, config.image_size, config.crops, device,
                                    config.batch_size):
        calibration = best["calibration"] | scores.calibrate()
        checkpoint.save(folder / "best.pt", best | {"calibration": calibration, "tiles": config.crops})


def configure(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration that a command line means, and notes; see resolve_defaults."""
    return resolve_defaults(Config, parse(Config, argv), model)


def main(argv: Sequence[str] | None = None) -> None:
    """python train.py ..., or torchrun --nproc_per_node=N train.py ..."""
    precision.tune_malloc()
    with distributed.init_world() as world, stopped_by_sigterm(world):
        request = world.broadcast(read_request(Config, argv, model) if world.rank == 0 else None)
        config, folder, begun = request.config, request.folder, time.perf_counter()
        tell = print if world.rank == 0 else lambda *_: None
        tell("\n".join([*request.notes, describe_run(config, folder, world)]))
        try:
            result = fit(*request, world=world)
        except KeyboardInterrupt as stopped:
            tell("\ninterrupted; " + (f"go on with: {stopped}" if str(stopped) else "the same command goes on"
                                      if request.resume else "nothing was trained yet"))
            sys.exit(130)
        what = "DRAWN photographs, not IDRiD" if config.data is None else config.data
        tell(f"\nbest checkpoint: epoch {result['epoch']} of {folder}, validation split of {what}")
        best = load_tensors(folder / "best.pt")
        tell(tables.table(result["metrics"], make_tasks(config.tasks, best["options"]["names"])))
        tell(calibration_line(best["calibration"]))
        if result["usage"] and (unused := routing.unused_experts(u["tokens"] for u in result["usage"].values())):
            tell(routing.warning(unused))
        tell("weights: " + ", ".join(f"{name} {digest[:16]}" for name, digest in result["weights"].items()))
        minutes = (time.perf_counter() - begun) / 60
        again = "Score it again, and see what its experts do" if config.num_experts else "Score it again"
        tell(f"{minutes:.1f} minutes. {again}: python evaluate.py {folder}" + " --routing" * (config.num_experts > 0))


if __name__ == "__main__":
    run_cli(main)
