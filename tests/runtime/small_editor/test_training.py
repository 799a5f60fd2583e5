import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch


@pytest.fixture
def tiny_config(trainer):
    return trainer.TrainingConfig(steps=6, batch_size=2, warm_up=2, num_layers=1, seed=5)


def run(trainer, config, output, **options):
    defaults = {"device": torch.device("cpu"), "log_every": 1, "num_workers": 0}
    return trainer.train(config, output, **(defaults | options))


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_resumed_run_equals_the_uninterrupted_one(trainer, tiny_config, tmp_path):
    whole = weights(run(trainer, tiny_config, tmp_path / "whole"))
    run(trainer, tiny_config, tmp_path / "parts", stop_after=3)
    parts = weights(run(trainer, tiny_config, tmp_path / "parts", resume=True))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training-log.jsonl").open()]
        for name in ("whole", "parts")
    ]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 5, 6]
    columns = ("step", "loss", "gradient_norm", "learning_rate")
    assert [[e[c] for c in columns] for e in logs[0]] == [[e[c] for c in columns] for e in logs[1]]


def test_seed_decides_the_weights(trainer, tiny_config, tmp_path):
    config = replace(tiny_config, steps=2)
    first = weights(run(trainer, config, tmp_path / "a"))
    again = weights(run(trainer, config, tmp_path / "b"))
    other = weights(run(trainer, replace(config, seed=6), tmp_path / "c"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_log_lines_after_the_checkpoint_are_drawn_again(trainer, tiny_config, tmp_path):
    run(trainer, tiny_config, tmp_path, stop_after=2)
    with (tmp_path / "training-log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9}\n')
    run(trainer, tiny_config, tmp_path, resume=True, stop_after=4)
    entries = [json.loads(line) for line in (tmp_path / "training-log.jsonl").open()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[2]["loss"] != 9


def test_resume_with_other_options_is_refused(trainer, tiny_config, tmp_path):
    run(trainer, tiny_config, tmp_path, stop_after=1)
    with pytest.raises(SystemExit, match=r"differ.*'batch_size': \(2, 3\)"):
        run(trainer, replace(tiny_config, batch_size=3), tmp_path, resume=True)
    with pytest.raises(SystemExit, match="no checkpoint"):
        run(trainer, tiny_config, tmp_path / "empty", resume=True)


def test_more_steps_leave_the_level_part_of_the_rate_as_it_was(trainer):
    short, long = (trainer.TrainingConfig(steps=steps) for steps in (1000, 2000))
    assert [short.rate(s) for s in range(200)] == [long.rate(s) for s in range(200)]
    assert short.rate(0) == pytest.approx(short.learning_rate / short.warm_up)
    assert short.rate(190) == short.learning_rate
    rates = [short.rate(s) for s in range(200, 336)]
    assert rates == sorted(rates, reverse=True)
    last = [short.rate(s) for s in range(400, 1001)]
    assert 0 < max(last) < short.learning_rate
    assert last == sorted(last, reverse=True)
    assert short.rate(1000) == 0


def test_training_goes_on_from_an_exported_model(trainer, tiny_config, tmp_path):
    first = run(trainer, tiny_config, tmp_path / "first", stop_after=3)
    trained = {"trained_steps": 3, "training_seconds": 7}
    trainer.write_results(
        first,
        tiny_config,
        tmp_path / "first",
        device=torch.device("cpu"),
        count=1,
        num_inference_steps=1,
        trained=trained,
    )
    model = tmp_path / "first" / "model"
    untouched = run(
        trainer, tiny_config, tmp_path / "same", continue_from=model, stop_after=3
    ).state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in first.state_dict().items())
    further = run(trainer, tiny_config, tmp_path / "further", continue_from=model)
    assert not torch.equal(
        further.text_encoder.embedding.weight, first.text_encoder.embedding.weight
    )
    entries = [json.loads(line) for line in (tmp_path / "further/training-log.jsonl").open()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[3]["seconds"] >= 7


def test_model_that_is_not_there_is_named(trainer, tiny_config, tmp_path):
    with pytest.raises(SystemExit, match=r"--continue-from.*nowhere"):
        run(trainer, tiny_config, tmp_path / "out", continue_from=tmp_path / "nowhere")


def test_batch_is_a_function_of_seed_and_step(trainer, tiny_config):
    batches = trainer.EditBatches(tiny_config)
    first, again, other = batches[3], batches[3], batches[4]
    for name in ("tokens", "sigma", "noise", "target"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["noise"], other["noise"])


def test_noise_levels_are_stratified(trainer):
    sigma = trainer.EditBatches(trainer.TrainingConfig(batch_size=8))[0]["sigma"]
    assert sorted((sigma * 8).int().tolist()) == list(range(8))


def test_buckets_draw_every_layout_and_drop_some_captions(trainer):
    batches = trainer.EditBatches(trainer.TrainingConfig(batch_size=2))
    layouts, empty, total = set(), 0, 0
    for step in (*range(30), *range(2000, 2030), *range(4700, 4720)):
        batch = batches[step]
        layouts.add(tuple(reference.shape[-1] for reference in batch["references"]))
        empty += sum(words[0] == batches.tokenizer.encode("")[0] for words in batch["tokens"])
        total += 2
    assert layouts == {(48,), (72,), (48, 48), (72, 48)}
    assert 0 < empty < 0.25 * total


@pytest.mark.parametrize("sizes", [(12,), (18, 12)])
def test_training_forward_equals_diffusers_forward(trainer, sizes):
    from ditrim.runtime.small_editor.modules import build_transformer

    torch.manual_seed(0)
    trainee = trainer.Trainee(trainer.TrainingConfig(num_layers=2))
    for weight in trainee.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    grids = [(1, 12, 12), *((1, side, side) for side in sizes)]
    latents = torch.randn(2, sum(h * w for _, h, w in grids), 48)
    sigma, tokens = torch.tensor([0.3, 0.9]), torch.tensor([[4, 5, 6], [7, 8, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    plain = build_transformer(num_layers=2).eval()
    plain.load_state_dict(trainee.transformer.state_dict())
    trainee.transformer.set_attn_processor(trainer.RealRopeAttention())
    with torch.no_grad():
        ours = trainee(latents, sigma, tokens, mask, grids)
        theirs = plain(
            hidden_states=latents,
            encoder_hidden_states=trainee.text_encoder(tokens),
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[grids] * 2,
            return_dict=False,
        )[0][:, :144]
    worst = float((ours - theirs).abs().max())
    assert worst < 2e-5 * float(theirs.abs().max()), f"largest error {worst}"


def test_command_trains_exports_and_measures(trainer, tmp_path, capsys):
    options = ["--output", str(tmp_path), "--steps", "1", "--batch-size", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    few = ["--evaluate-count", "2", "--evaluate-steps", "1"]
    try:
        assert trainer.main([*options, *few, "--device", "cpu"]) == 0
        assert trainer.main([*options, *few, "--device", "cpu", "--evaluate-only"]) == 0
    finally:
        torch.set_num_threads(threads)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {"local", "global", "camera", "transfer"}
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["by_category"]["local"]["count"] == 2
    assert metrics["trained_steps"] == 1
    assert 4e6 < metrics["parameters"] < 20e6
    assert (tmp_path / "contact-sheet.png").is_file()
    assert (tmp_path / "model" / "training-log.jsonl").is_file()


def test_thinned_log_keeps_the_last_line(trainer):
    lines = [str(number) for number in range(1001)]
    thinned = trainer.thin_log(lines, most=100)
    assert len(thinned) <= 101
    assert thinned[-1] == "1000"
    assert trainer.thin_log(["a"]) == ["a"]
    assert trainer.thin_log([]) == []


def test_averaged_weights_follow_the_trained_ones(trainer):
    average, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = average.weight.detach().clone()
    trainer.update_average(average, trained, step=10_000, decay=0.9)
    expected = 0.9 * before + 0.1 * trained.weight
    assert np.allclose(average.weight.detach(), expected.detach(), atol=1e-6)


def test_configuration_survives_a_checkpoint(trainer, tiny_config, tmp_path):
    run(trainer, tiny_config, tmp_path, stop_after=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert trainer.TrainingConfig(**state["config"]) == tiny_config
    assert state["config"] == asdict(tiny_config)


def test_second_phase_draws_more_noise_and_weighs_what_is_edited(trainer):
    config = trainer.TrainingConfig(batch_size=4, second_phase=3)
    batches = trainer.EditBatches(config)
    first, second = ([batches[step] for step in steps] for steps in (range(3), range(3, 9)))
    assert all((batch["weight"] == 1).all() for batch in first)
    assert {float(w) for b in second for w in b["weight"].unique()} == {1, 1 + config.edit_weight}
    assert np.mean([batch["sigma"].mean() for batch in first]) == pytest.approx(0.5, abs=0.1)
    assert np.mean([batch["sigma"].mean() for batch in second]) == pytest.approx(0.65, abs=0.1)
    assert all(((b["sigma"] >= 0) & (b["sigma"] <= 1)).all() for b in second)
