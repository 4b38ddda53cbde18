"""Whole trainings: what they leave, how they stop and resume, what they refuse."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import stages
import train
from conftest import ROOT
from sample import Pipeline
from support import processes, tools
from support.cache import embed
from support.checkpoint import load_checkpoint, save_checkpoint
from support.muon import make_optimizers
from support.shapes import Shapes
from support.tools import UserError
from train import Batches

UPSAMPLER = ["upsampler1", "--preset", "micro", "--batch-size", "4", "--limit", "16",
             "--sample-every", "1000", "--workers", "0"]
# A script for another process. conftest registers the micro preset.
SCRIPT = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import conftest, train
if __name__ == "__main__": sys.exit(train.main())"""


def run(folder, *options):
    """Train upsampler1 in `folder`: the exit code."""
    return train.main([*UPSAMPLER, "--out", str(folder), *map(str, options)])


def saved(folder, stage="upsampler1"):
    return load_checkpoint(folder / f"{stage}.pt")


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


# --- what a run leaves ---------------------------------------------------------------------------


def test_all_trains_every_stage_and_leaves_checkpoints_metrics_and_pictures(micro_run):
    identity = stages.load_clip(micro_run).identity
    metrics = [*map(json.loads, (micro_run / "metrics.jsonl").read_text().splitlines())]
    for stage in stages.STAGES:
        made = saved(micro_run, stage)
        assert made["step"] == 3 and made["run"]["command"].startswith("python train.py ")
        assert {"seed", "fingerprint", "preset"} <= set(made["run"])
        assert 0 <= made["figures"]["data_wait"] < 1
        if stages.needs_clip(stage):
            assert made["clip"]["identity"] == identity
        lines = [m for m in metrics if m["stage"] == stage]
        assert all(math.isfinite(m["loss"]) for m in lines if "loss" in m)
        assert "val_loss" in lines[-1]
        about = json.loads((micro_run / f"{stage}.json").read_text())
        assert about["config"] == json.loads(json.dumps(made["config"]))
    for stage, rows in (("decoder", 4), ("upsampler1", 8), ("upsampler2", 8)):
        grid = Image.open(micro_run / "samples" / f"{stage}_000003.png")
        assert grid.height >= rows * 128
    assert {"cos_true", "cos_text", "cos_unrelated"} < {k for m in metrics for k in m}


def test_the_grid_shows_the_captions_that_the_decoder_read(micro_run, tmp_path, monkeypatch):
    clip, data, seen = stages.load_clip(micro_run), Shapes(24, "val"), {}
    model = stages.load_stage(micro_run, "decoder_caption")

    def draw(image_emb, text_enc, text_mask, **settings):
        seen.update(text_enc=text_enc, text_mask=text_mask)

    monkeypatch.setattr(model, "sample", draw)
    _, _, captions = model.preview(Batches(model, data, embed(clip, data, tmp_path), 16, 0))
    ids = clip.tokenizer(captions)
    assert len(set(map(len, captions))) > 1
    assert seen["text_enc"][seen["text_mask"]].tolist() == ids[ids > 0].tolist()
    drawer = Pipeline(micro_run, decoder="decoder_caption")  # and so does the one that draws
    assert drawer.text(captions)[1].tolist() == ids.tolist()


# --- interruptions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "--steps", 30, "--save-every", 5) == 0
    return folder


def test_kill_9_then_resume_ends_with_the_same_bits(tmp_path, uninterrupted):
    options = map(str, (*UPSAMPLER, "--steps", 30, "--save-every", 5, "--out", tmp_path))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *options], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, log = time.time() + 100, tmp_path / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 9:
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    step = saved(tmp_path)["step"]
    assert 5 <= step < 30 and step % 5 == 0  # lost no more than the steps since then
    assert train.main(["upsampler1", "--resume", "--workers", "0", "--out", str(tmp_path)]) == 0
    for key in ("model", "ema"):
        assert_same(saved(tmp_path)[key], saved(uninterrupted)[key])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_asks_to_stop_saves_first(
        tmp_path, monkeypatch, number, uninterrupted, capsys):
    loss, calls = stages.Upsampler.loss, []

    def interrupted_in_step_7(self, batch, t=None):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(number)
        return loss(self, batch, t)

    monkeypatch.setattr(stages.Upsampler, "loss", interrupted_in_step_7)
    before = signal.getsignal(number)
    assert run(tmp_path, "--steps", 30, "--save-every", 5) == 130
    assert saved(tmp_path)["step"] == 7 and signal.getsignal(number) == before
    assert "is saved at step 7: --resume continues" in capsys.readouterr().err
    assert run(tmp_path, "--resume") == 0
    assert_same(saved(tmp_path)["model"], saved(uninterrupted)["model"])


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with processes.stop_signals() as asked:
        signal.raise_signal(signal.SIGHUP)
    assert not asked and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_blocked_worker_ends_with_the_loop(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    busy, cpu = torch.multiprocessing.Event(), torch.device("cpu")
    with processes.in_workers(lambda k: busy.set() or time.sleep(1000), [0], 1, cpu) as made:
        assert busy.wait(100)
    made._workers[0].join(100)
    assert made._workers[0].exitcode == -signal.SIGKILL


def test_workers_change_nothing(tmp_path, uninterrupted):
    assert run(tmp_path, "--steps", 30, "--workers", "1") == 0
    assert_same(saved(tmp_path)["model"], saved(uninterrupted)["model"])


def test_a_finished_stage_is_left_alone(micro_run, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--steps", 2) == 0
    before = (tmp_path / "upsampler1.pt").read_bytes()
    assert run(tmp_path, "--steps", 2) == 2  # without --resume nothing is overwritten
    assert "--resume" in capsys.readouterr().err
    assert run(tmp_path, "--resume") == 0
    assert "already trained" in capsys.readouterr().out
    assert (tmp_path / "upsampler1.pt").read_bytes() == before
    monkeypatch.setattr(train, "embed", None)  # nor are embeddings computed for it
    assert train.main(["prior", "--out", str(micro_run), "--resume", "--workers", "0"]) == 0


def test_a_run_with_a_pretrained_clip_trains_no_small_one_when_it_goes_on(
        micro_run, tmp_path, capsys):
    trained = saved(micro_run, "prior")
    clip = trained["clip"] | {"spec": "ViT-B-32:file.pt"}
    save_checkpoint(tmp_path / "prior.pt", trained | {"clip": clip})
    assert train.main(["clip", "--resume", "--out", str(tmp_path)]) == 0
    assert "ViT-B-32:file.pt is a pretrained one" in capsys.readouterr().out
    assert not (tmp_path / "clip.pt").exists()


@pytest.fixture
def photos(tmp_path):
    """Options to train CLIP on six captioned pictures in tmp_path, into its folder run."""
    for k in range(6):
        Image.new("RGB", (40, 30), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    return ["clip", "--preset", "micro", "--data", "folder", "--root", str(tmp_path),
            "--out", str(tmp_path / "run")]


def test_a_run_keeps_its_data_and_a_stage_its_settings(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos[photos.index("--root") + 1] = "."
    assert train.main([*photos, "--steps", "2", "--batch-size", "4", "--workers", "0"]) == 0
    monkeypatch.chdir(ROOT)
    for stage, steps, size in (("clip", 4, 4), ("upsampler1", 3, 2)):
        again = [stage, "--resume", "--workers", "0", "--out", str(tmp_path / "run")]
        assert train.main([*again, "--data", "shapes"]) == 2  # not on other pictures, silently
        assert f"error: {stage}: data was folder, is shapes now" in capsys.readouterr().err
        given = ["--steps", str(steps), *(["--batch-size", "2"] if stage != "clip" else [])]
        assert train.main([*again, *given]) == 0
        made = saved(tmp_path / "run", stage)["run"]
        assert (made["data"], made["root"], made["preset"]) == ("folder", str(tmp_path), "micro")
        assert (made["steps"], made["batch_size"]) == (steps, size)


def test_examples_are_counted_through_another_batch_size(tmp_path):
    assert run(tmp_path, "--steps", 3) == 0
    assert saved(tmp_path)["figures"]["examples"] == 3 * 4
    for steps, size, count in ((5, 8, 3 * 4 + 2 * 8), (6, 4, 3 * 4 + 2 * 8 + 4)):
        assert run(tmp_path, "--resume", "--steps", steps, "--batch-size", size) == 0
        assert saved(tmp_path)["figures"]["examples"] == count


# --- when something goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the loss is nan", "a weight is no longer finite"])
def test_what_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys, what):
    """The loss of a step is that of the weights before it, so it is finite when they break."""
    loss, calls = stages.Upsampler.loss, []

    def breaks_at_step_5(self, batch, t=None):
        calls.extend([1] * self.training)  # not those of the validation
        return loss(self, batch, t) * (math.nan if self.training and len(calls) == 5 else 1)

    if "loss" in what:
        monkeypatch.setattr(stages.Upsampler, "loss", breaks_at_step_5)
    else:
        monkeypatch.setattr(train, "learning_rate", lambda k, settings: 1e-3 if k < 4 else math.inf)
    assert run(tmp_path, "--save-every", 2, "--steps", 8) == 2
    said = f"step 5: {what}. The last checkpoint is kept: try a smaller --lr"
    assert said in capsys.readouterr().err and saved(tmp_path)["step"] == 4


def test_a_checkpoint_is_saved_though_its_pictures_cannot_be(tmp_path, monkeypatch):
    def full(image, path, **options):
        raise UserError("cannot write: no room")

    monkeypatch.setattr(train, "save_picture", full)
    assert run(tmp_path, "--steps", 2) == 2 and saved(tmp_path)["step"] == 2


@pytest.mark.parametrize("arguments, says", [
    (["clip", "--batch-size", "0"], "must be 1 to 10"),
    (["clip", "--data", "folder"], "--root"),
    (["clip", "--data", "folder", "--root", "/no/such/folder"], "/no/such/folder"),
    (["prior", "--preset", "micro"], "clip.pt"),
    (["clip", "--batch-size", "1"], "2 or more"),
    (["export"], "--to"),
    (["clip", "--root", "/pictures"], "give --data folder"),
    ([*UPSAMPLER, "--out", f"{ROOT}/LICENSE"], f"{ROOT}/LICENSE"),  # a file
])
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, says, capsys, tmp_path):
    assert train.main(["--out", str(tmp_path / "run"), *arguments]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ") and says in errors and "\n" not in errors


def test_a_picture_that_breaks_in_training_is_named_in_one_line(tmp_path, photos):
    """And the workers end, which wait for orders and ignore signals: in a process of its own."""
    data = train.load_data("folder", str(tmp_path))
    script = SCRIPT.replace("sys.exit", f"""
    train.load_data("folder", {str(tmp_path)!r})  # all fine now, and remembered as fine
    os.truncate({str(data.items[0][0])!r}, 50)
    sys.exit""").replace("import sys", "import os, sys")
    made = subprocess.run([sys.executable, "-c", script, *photos, "--workers", "2"], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True, timeout=300)
    last = made.stderr.strip().splitlines()[-1]
    assert made.returncode == 2 and "Traceback" not in made.stderr
    assert last.startswith("error: image") and data.items[0][0].name in last


# --- copies to give away -------------------------------------------------------------------------


def test_an_exported_run_draws_the_same_and_is_much_smaller(micro_run, tmp_path, capsys):
    assert train.main(["export", "--out", str(micro_run), "--to", str(tmp_path)]) == 0
    for stage in stages.ORDER:
        whole, small = micro_run / f"{stage}.pt", tmp_path / f"{stage}.pt"
        assert small.stat().st_size < whole.stat().st_size / 3
        weights = stages.load_stage(tmp_path, stage).state_dict()
        for name, value in stages.load_stage(micro_run, stage).state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert stages.load_clip(micro_run).identity == stages.load_clip(tmp_path).identity
    # It can be trained on from, with a new optimizer.
    assert run(tmp_path, "--resume", "--steps", 9) == 0
    assert "the optimizer starts anew" in capsys.readouterr().out
    assert all(v.dtype == torch.float32 for v in saved(tmp_path)["ema"].values())


def test_an_export_replaces_nothing(micro_run, tmp_path):
    whole = Path(shutil.copy(micro_run / "upsampler2.pt", tmp_path))
    for to in (tmp_path, micro_run):
        assert train.main(["export", "--out", str(micro_run), "--to", str(to)]) == 2
    assert whole.read_bytes() == (micro_run / "upsampler2.pt").read_bytes()
    assert not (tmp_path / "clip.pt").exists()  # nothing was written at all


# --- precision, compiler, processes --------------------------------------------------------------


def test_every_stage_trains_and_draws_with_autocast_as_it_is_not_on_this_machine(
        monkeypatch, tmp_path):
    """CPUs differ in whether bfloat16 is fast: all other tests run as it is here."""
    import manipulate
    import sample
    from lab import evaluate

    fast = tools.cpu_is_fast_in_bf16()
    monkeypatch.setattr(tools, "cpu_is_fast_in_bf16", lambda: not fast)
    options = ["--preset", "micro", "--out", str(tmp_path), "--workers", "0", "--steps", "2"]
    for stage in ("all", "ar_prior", "decoder_caption"):
        assert train.main([stage, *options, "--sample-every", "1"]) == 0
    options = ["--weights", str(tmp_path), "--size", "64", "--out", str(tmp_path)]
    assert sample.main(["a red circle", "-n", "1", *options]) == 0
    picture = str(tmp_path / "a-red-circle_0.png")
    mask, steps = str(ROOT / "docs/pictures/mask.png"), ["--steps", "3", *options]
    assert manipulate.main(["vary", picture, "-n", "1", *steps]) == 0
    assert manipulate.main(["edit", picture, "--to", "a blue star", "--frames", "2", *steps]) == 0
    assert manipulate.main(["inpaint", picture, mask, "a red circle", *steps]) == 0
    assert evaluate.main(["losses", "-n", "8", "--weights", str(tmp_path)]) == 0


@pytest.mark.parametrize("stage", [*stages.ORDER, "ar_prior", "decoder_caption"])
def test_a_compiled_loss_is_one_graph_and_the_same_number(stage, micro_run, tmp_path):
    """What --compile hands to the compiler, without its code generator, which takes minutes.

    fullgraph: an error where the graph would break, as at a look at a number in a tensor."""
    model, data, embeddings = stages.load_stage(micro_run, stage).train(), Shapes(24), None
    if stages.needs_clip(stage):
        embeddings = embed(stages.load_clip(micro_run, "small"), data, tmp_path)
    batch = Batches(model, data, embeddings, 8, 0)[0]
    torch._dynamo.reset()
    compiled = torch.compile(train.Loss(model), backend="eager", fullgraph=True)
    numbers = []
    for loss in (compiled, model.loss):
        torch.manual_seed(0)
        numbers.append(loss(batch).item())
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.mark.skipif(not shutil.which("c++"), reason="generated code needs a C++ compiler")
def test_a_compiled_training_ends_where_an_uncompiled_one_does(micro_run, tmp_path):
    """Code is generated here, for this processor, and run. The seeds are the same, and so is the
    noise; only the rounding of sums differs."""
    trained = []
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        (tmp_path / name).mkdir()
        shutil.copy(micro_run / "clip.pt", tmp_path / name)
        assert train.main(["prior", "--preset", "micro", "--out", str(tmp_path / name),
                           "--workers", "0", "--steps", "2", *extra]) == 0
        trained.append(saved(tmp_path / name, "prior")["figures"])
    for name in ("loss", "val_loss"):
        assert trained[1][name] == pytest.approx(trained[0][name], rel=1e-3)


def torchrun(tmp_path, *arguments):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), *map(str, arguments)],
        cwd=ROOT, check=True, capture_output=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_all_stages_in_turn_by_the_averaged_gradient(tmp_path):
    """torchrun with gloo on this machine. Nobody reads a CLIP that is half trained; and upsampler1
    is compared with both halves computed here by hand."""
    torchrun(tmp_path, "all", *UPSAMPLER[1:], "--steps", 2, "--out", tmp_path / "two")
    identity = stages.load_clip(tmp_path / "two").identity
    for stage in stages.ORDER:
        made = saved(tmp_path / "two", stage)
        assert made["step"] == 2
        assert made["clip"] is None or made["clip"]["identity"] == identity
    torch.manual_seed(0)
    model = stages.fresh_model("upsampler1", "micro", None, None, None).train()
    optimizers, settings = make_optimizers(model, 2.0), {"steps": 2, "lr": 1e-3}
    for step in range(2):
        for rank in range(2):
            batch = Batches(model, Shapes(16), None, 4, 0, "cpu", rank, 2)[step]
            torch.manual_seed(hash((0, step, rank)) % 2**62)
            with tools.autocast("cpu"):
                loss = model.loss(batch) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.MAX_GRADIENT)
        train.take_step(optimizers, train.learning_rate(step, settings), "cpu")
        model.zero_grad()
    expected = model.state_dict()
    for name, value in saved(tmp_path / "two")["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_what_is_fitted_rather_than_trained_is_in_the_checkpoints(micro_run):
    table = stages.load_stage(micro_run, "prior").diffusion.x_0_variance
    assert (table > 0).all() and table[-1] >= table[0]  # the analytic variance
    prior = stages.load_stage(micro_run, "ar_prior")
    identity = prior.basis @ prior.basis.T
    torch.testing.assert_close(identity, torch.eye(len(identity)), rtol=0, atol=1e-4)
    assert (prior.edges.diff(dim=1) >= 0).all() and prior.values.abs().sum() > 0


def test_captions_of_many_lengths_share_two_graphs(micro_run, tmp_path):
    graphs, data = [], Shapes(24)
    embeddings = embed(stages.load_clip(micro_run), data, tmp_path)
    model, lengths = stages.load_stage(micro_run, "decoder").train(), set()
    torch._dynamo.reset()
    loss_of = train.Loss(model)
    loss_of.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    for step in range(8):
        batch = Batches(model, data, embeddings, 3, 0)[step]
        lengths.add(batch["text_enc"].shape[1])
        loss_of(batch)
    assert len(lengths) > 2 and len(graphs) == 2  # one length, then any length
