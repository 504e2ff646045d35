"The training loop on problems of seconds: exact fractions over micro-batches and processes, what is kept, what stays frozen, what is refused."
import copy, json, os, socket, subprocess, sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import patch_optimizer_step
from torch import nn
from torch.utils.data import DataLoader

from mscan import training
from mscan.training import (INTENDED_USE, Loop, WeightsError, fit, freeze, load_card, load_state, load_weights, loaded, pick_device, pick_precision, save_weights,
                            seed_everything, weighted_ce)
from mscan.weights import mscan_weights

CARD = dict(architecture='toy', preprocessing={}, classes=['a'], intended_use=INTENDED_USE)


def problem(n=24, seed=0):
    "n toy levels with grades so unequal in weight that a mean of means is wrong."
    g = torch.Generator().manual_seed(seed)
    grades = torch.tensor([0, 0, 2, 2, 0, 1, 0, -1])[torch.arange(n) % 8]
    return [dict(x=x, grade=y) for x, y in zip(torch.randn(n, 6, generator=g), grades)]


def network(seed=0, width=16):
    seed_everything(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def loss(model, batch): return weighted_ce(model(batch['x']), batch['grade'])


def mean_loss(model, batch):
    n, d = loss(model, batch)
    return n/d.clamp(min=1), torch.ones(())


def train(batch=8, accumulation=1, loss=loss, data=None, validation=None, model=None, shuffle=True, **settings):
    model = model or network()
    loader = DataLoader(data or problem(), batch_size=batch, shuffle=shuffle)
    settings = dict(dict(epochs=3, lr=.02, device='cpu', progress=False), **settings)
    return model, fit(model, loss, loader, validation, accumulation=accumulation, **settings)


def distance(a, b): return max(float((p - q).abs().max()) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_accumulation_is_exact_and_the_naive_mean_is_not():
    whole, history = train(8, 1)
    parts, other = train(2, 4)
    assert distance(whole, parts) < 1e-6
    assert abs(history.table.train_loss - other.table.train_loss).max() < 1e-6
    assert distance(train(8, 1, mean_loss)[0], train(2, 4, mean_loss)[0]) > 1e-3


def test_loss_values_are_fractions_over_everything():
    "Unequal batches (24 = 7 + 7 + 7 + 3): the mean of batch means differs from the reported loss."
    data, held_out = problem(), DataLoader(problem(30, seed=5), batch_size=7)
    model, history = train(7, data=data, validation=held_out, epochs=1, lr=0., weight_decay=0.)
    for items, value in ((data, history.table.train_loss[0]), (held_out.dataset, history.table.validation_loss[0])):
        n, d = loss(model, torch.utils.data.default_collate(items))
        assert abs(float(n.detach()/d) - value) < 1e-6


def test_step_size_counts_last_short_window():
    "5 micro-batches in windows of 2: three steps, the last from one micro-batch alone, as if the batches were 4, 4, 2."
    data = problem(10)
    assert distance(train(2, 2, data=data, shuffle=False)[0], train(4, 1, data=data, shuffle=False)[0]) < 1e-6


def test_masked_grades_give_no_gradient():
    z = torch.randn(2, 5, 3, requires_grad=True)
    grade = torch.tensor([[0., 1, 2, float('nan'), -1], [-1, -1, -1, -1, -1]])
    n, d = weighted_ce(z, grade)
    (n/d).backward()
    assert d == 7 and (z.grad[0, :3] != 0).all() and (z.grad[0, 3:] == 0).all() and (z.grad[1] == 0).all()
    n, d = weighted_ce(z.half(), torch.full((2, 5), -1))
    assert n == 0 and d == 0 and n.dtype == torch.float32
    with pytest.raises(ValueError, match='do not fit'): weighted_ce(z, grade[0])


def test_window_without_labels_makes_no_step():
    data = [dict(x=s['x'], grade=torch.tensor(-1)) for s in problem()]
    model, _ = train(data=data, weight_decay=.5)
    assert distance(model, network()) == 0


def test_best_epoch_is_kept():
    validation, seen = DataLoader(problem(40, seed=9), batch_size=40), []
    model, history = train(epochs=12, lr=.2, schedule='constant', validation=validation, clip=None,
                           on_epoch=lambda m, row: seen.append(copy.deepcopy(m.state_dict())) or dict(twice=2*row['epoch']))
    table = history.table
    assert list(table.epoch) == list(range(1, 13)) and list(table.twice) == list(range(2, 26, 2))
    assert history.best_epoch == table.epoch[table.validation_loss.idxmin()] < 12
    assert all(torch.equal(v, seen[history.best_epoch - 1][k]) for k, v in model.state_dict().items())
    assert not model.training and not history.stopped_early
    again, short = train(epochs=12, lr=.2, schedule='constant', validation=validation, clip=None, patience=2)
    assert short.stopped_early and short.best_epoch == len(short.table) - 2
    first = table.validation_loss[:len(short.table)]
    assert abs(first - short.table.validation_loss).max() < 1e-6


def test_without_validation_the_last_epoch_stays():
    last = []
    model, history = train(on_epoch=lambda m, row: last.append(copy.deepcopy(m)) and None)
    assert history.best_epoch == 3 and distance(model, last[-1]) == 0 and history.table.validation_loss.isna().all()


def test_same_seed_same_weights_whatever_happened_before():
    a, _ = train(seed=3)
    model = network()
    torch.rand(1000)
    b, _ = train(seed=3, model=model)
    c, _ = train(seed=4)
    assert distance(a, b) == 0 and distance(a, c) > 0


def test_dropout_is_seeded():
    def run(seed):
        seed_everything(0)
        return train(model=nn.Sequential(nn.Linear(6, 16), nn.Dropout(.5), nn.Linear(16, 3)), shuffle=False, seed=seed)[0]
    assert distance(run(1), run(1)) == 0 and distance(run(1), run(2)) > 0


def test_frozen_parts_do_not_move():
    def run(hold):
        seed_everything(0)
        encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        model = nn.Sequential(hold(encoder), nn.BatchNorm1d(8), nn.Linear(8, 3))
        before = copy.deepcopy(model.state_dict())
        train(model=model)
        return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    moved = run(freeze)
    assert not any(k.startswith('0.') for k in moved) and {'1.running_mean', '2.weight'} <= moved
    assert '0.1.running_mean' in run(lambda m: m.requires_grad_(False))  # half of freezing is not enough


def test_loss_that_is_not_finite_stops_and_says_where():
    data = problem(16)
    data[9]['x'] = torch.full((6,), float('nan'))
    with pytest.raises(FloatingPointError, match=r'canal epoch 1/3, step 3'): train(4, data=data, shuffle=False, label='canal')


def test_settings_are_checked():
    for settings, words in ((dict(schedule='cosine'), 'one_cycle'), (dict(mixed_precision='fp8'), 'mixed_precision'),
                            (dict(mixed_precision='fp16'), 'needs a GPU'), (dict(model=freeze(network())), 'nothing to train')):
        with pytest.raises(ValueError, match=words): train(**settings)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='no GPU'): pick_device('cuda')


def test_one_cycle_reaches_the_rate_and_even_one_step_moves():
    rates = train(epochs=10).__getitem__(1).table.lr
    assert .015 < rates.max() <= .02 and rates.iloc[-1] < .002
    assert distance(train(24, epochs=1)[0], network()) > 1e-3


def test_mixed_precision_leaves_the_model_clean():
    "bf16 computes in bf16, the model stays float32, and a second training in this process may use another precision."
    kinds = []
    def look(model, batch):
        out = model(batch['x'])
        kinds.append(model[0](batch['x']).dtype)
        return weighted_ce(out, batch['grade'])
    model, history = train(loss=look, mixed_precision='bf16')
    assert history.precision == 'bf16' and kinds[0] == torch.bfloat16
    assert 'forward' not in vars(model) and model(torch.randn(2, 6)).dtype == torch.float32
    copy.deepcopy(model)
    full, history = train()
    assert history.precision == 'no' and 0 < distance(model, full) < .1


def test_plain_lists_of_batches_will_do():
    data = [torch.utils.data.default_collate(problem()[i:i + 8]) for i in (0, 8, 16)]
    model = network()
    fit(model, loss, data, data, epochs=3, lr=.02, device='cpu', progress=False)
    assert distance(model, train(shuffle=False)[0]) < 1e-6


TWO = '''
import sys; sys.path.insert(0, {tests!r})
import torch
from test_training import DataLoader, fit, loss, network, problem, save_weights, CARD
for shuffle, n, v in ((True, 24, 7), (False, 20, 7), (False, 4, 30)):  # 20 = five batches of 4: uneven over two processes; one batch: the second process has none
    model = network()
    history = fit(model, loss, DataLoader(problem(n), batch_size=4, shuffle=shuffle), DataLoader(problem(30, seed=7), batch_size=v),
                  epochs=3, lr=.02, device='cpu', progress=False)
    if torch.distributed.get_rank() == 0: save_weights(model, {out!r} + str(n), CARD | dict(losses=history.table[['train_loss', 'validation_loss']].values.tolist()))
torch.distributed.destroy_process_group()
'''


def test_each_of_several_processes_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert str(pick_device('auto')) == 'cuda'
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert [str(pick_device(d)) for d in ('auto', 'cuda', 'cuda:0', 'cpu')] == ['cuda:1', 'cuda:1', 'cuda:0', 'cpu']
    with pytest.raises(ValueError, match='only 2 GPU'): pick_device('cuda:2')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(ValueError, match="'cuda:2' was asked for"): pick_device('auto')


def test_two_processes_equal_one(tmp_path):
    """Two processes with one micro-batch a step, and one process with two, end at the same weights and losses.

    Started by hand with the variables that torchrun sets: its launcher alone costs 7 s of imports."""
    script = tmp_path/'two.py'
    script.write_text(TWO.format(tests=str(Path(__file__).parent), out=str(tmp_path/'w')))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    common = dict(os.environ, OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    processes = [subprocess.Popen([sys.executable, script], env=dict(common, RANK=i, LOCAL_RANK=i), stderr=subprocess.PIPE, text=True) for i in '01']
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), errors[0][-2000:] + errors[1][-2000:]
    for shuffle, n in ((True, 24), (False, 20), (False, 4)):
        model, history = train(4, 2, data=problem(n), shuffle=shuffle, validation=DataLoader(problem(30, seed=7), batch_size=7))
        other = network()
        card = load_weights(other, tmp_path/f'w{n}')
        assert distance(model, other) < 1e-6
        assert abs(torch.tensor(card['losses']) - torch.tensor(history.table[['train_loss', 'validation_loss']].values)).max() < 1e-6


def test_weights_go_round(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight                                        # one storage, two names
            self.register_buffer('turned', torch.arange(6.).reshape(2, 3).T)      # not contiguous
    seed_everything(0); a = Tied()
    seed_everything(1); b = Tied()
    tensors, card = save_weights(a, tmp_path/'deep'/'tied.v2.safetensors', CARD)
    assert (tensors.name, card.name) == ('tied.v2.safetensors', 'tied.v2.json')
    assert load_weights(b, tmp_path/'deep'/'tied.v2')['architecture'] == 'toy'
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and b.b.weight is b.a.weight
    assert load_card(card) == load_card(tensors)
    assert not list((tmp_path/'deep').glob('*.part'))


def test_tampered_or_foreign_weights_are_refused(tmp_path):
    model = network()
    tensors, card = save_weights(model, tmp_path/'w', CARD)
    good = tensors.read_bytes(), card.read_text()
    before = copy.deepcopy(model.state_dict())
    for change, words in ((lambda: tensors.write_bytes(good[0][:-1] + bytes([good[0][-1] ^ 1])), 'sha256 differs'),
                          (lambda: tensors.write_bytes(good[0][:50]), 'sha256 differs'),
                          (tensors.unlink, 'no weights'),
                          (card.unlink, 'no card'),
                          (lambda: card.write_text('{'), 'not JSON'),
                          (lambda: card.write_text(json.dumps({k: v for k, v in json.loads(good[1]).items() if k != 'classes'})), 'lacks classes')):
        tensors.write_bytes(good[0]); card.write_text(good[1]); change()
        with pytest.raises(WeightsError, match=words): load_weights(model, tmp_path/'w')
    tensors.write_bytes(good[0]); card.write_text(good[1])
    with pytest.raises(WeightsError, match='does not fit'): load_weights(network(width=8), tmp_path/'w')
    with pytest.raises(WeightsError, match='lacks intended_use'): save_weights(model, tmp_path/'x', {k: v for k, v in CARD.items() if k != 'intended_use'})
    with pytest.raises(WeightsError, match='not a tensor'): save_weights(dict(a=1), tmp_path/'x', CARD)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_convert(tmp_path, capsys):
    model = network()
    ran = tmp_path/'ran'
    torch.save({'model': {f'module.{k}': v for k, v in model.state_dict().items()}, 'epoch': 3}, tmp_path/'plain.pt')
    torch.save({'weights': {'net': model.state_dict()}}, tmp_path/'nested.pt')
    torch.save({'model': model}, tmp_path/'object.pt')
    (tmp_path/'card.json').write_text(json.dumps(dict(architecture='Tanh net', classes=['n', 'm', 's'])))
    run = lambda *args: mscan_weights(['convert', *map(str, args)])
    run(tmp_path/'plain.pt', tmp_path/'a', '--card', tmp_path/'card.json')
    state, card = load_state(tmp_path/'a')
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert card['architecture'] == 'Tanh net' and card['converted_from']['file'] == 'plain.pt'
    run(tmp_path/'object.pt', tmp_path/'b', '--trust')
    assert set(load_state(tmp_path/'b')[0]) == set(state)
    for args, words in (((tmp_path/'object.pt', tmp_path/'c'), '--trust'), ((tmp_path/'gone.pt', tmp_path/'c'), 'no file'),
                        ((tmp_path/'nested.pt', tmp_path/'c'), '--key'), ((tmp_path/'nested.pt', tmp_path/'c', '--key', 'state'), 'it holds weights')):
        with pytest.raises(SystemExit) as e: run(*args)
        assert words in str(e.value.code)
    assert not (tmp_path/'c.json').exists() and not ran.exists()
    with pytest.raises(SystemExit) as e: mscan_weights(['convert'])
    assert e.value.code == 1 and 'required' in capsys.readouterr().err


def test_steps_that_do_not_wait_for_their_loss_end_where_the_others_do(monkeypatch):
    "On a GPU nothing is read back in a step: the fused optimiser is told on the device to skip an unlabelled batch. Here on the CPU, which has the same optimiser."
    data = problem() + [dict(x=torch.ones(6), grade=torch.tensor(-1))] * 8
    settings = dict(batch=8, data=data, shuffle=False, schedule='constant', epochs=2)
    waited, history = train(**settings)
    monkeypatch.setattr(Loop, 'waits', property(lambda self: False))
    free, other = train(**settings)
    assert distance(waited, free) < 1e-7 and abs(history.table.train_loss - other.table.train_loss).max() < 1e-7
    assert distance(free, train(**settings | dict(data=problem()))[0]) < 1e-7, 'the unlabelled batch of each epoch moved nothing'


def test_a_loss_that_is_not_finite_is_told_with_its_step_though_nobody_waited(monkeypatch):
    monkeypatch.setattr(Loop, 'waits', property(lambda self: False))
    calls = []

    def breaks(model, batch):
        calls.append(0)
        num, den = loss(model, batch)
        return (num * float('nan') if len(calls) == 3 else num), den
    model = network()
    with pytest.raises(FloatingPointError, match='step 3: training loss is nan'): train(4, loss=breaks, model=model)
    assert len(calls) == 6 and all(p.isfinite().all() for p in model.parameters()), 'seen at the end of the epoch, and the step itself was skipped'


@pytest.fixture
def scaled(monkeypatch):
    "fp16 needs a GPU, its scaler does not: trainings on the CPU, in float32, scaled as they would be. Called with the first scale, a power of two."
    def to(power):
        def begin(*args, **settings):
            loop = real(*args, **settings)
            acc, own = loop.accelerator, loop.optimizer
            acc.scaler = own.scaler = scaler = torch.amp.GradScaler('cpu', init_scale=2. ** power)
            acc.native_amp, acc.state._mixed_precision, acc.autocast = True, 'fp16', nullcontext
            own._accelerate_step_called, own._optimizer_original_step_method, own._optimizer_patched_step_method = False, own.optimizer.step, patch_optimizer_step(own, own.optimizer.step)
            scalers.append(scaler)
            return loop
        monkeypatch.setattr(training, 'start', begin)
        return scalers
    real, scalers = training.start, []
    return to


@pytest.mark.parametrize('clip', [None, .05, 1e6])
@pytest.mark.parametrize('accumulation', [1, 2])
def test_the_scaler_of_fp16_changes_no_step(scaled, clip, accumulation):
    "Scaled, divided by the denominator, unscaled, clipped, stepped: in this order the weights are those of a training without."
    settings = dict(batch=4, accumulation=accumulation, clip=clip, validation=DataLoader(problem(30, seed=7), batch_size=30))
    plain, history = train(**settings)
    scalers = scaled(10)
    model, other = train(**settings)
    assert other.precision == 'fp16' and scalers[0].get_scale() == 2. ** 10
    assert distance(plain, model) < 1e-6 and abs(history.table[['train_loss', 'validation_loss']] - other.table[['train_loss', 'validation_loss']]).to_numpy().max() < 1e-6


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_halved(scaled):
    scalers, calls = scaled(10), []

    def overflows(model, batch):
        num, den = loss(model, batch)
        calls.append(0)
        return (num + 0 * (0 * model[0].weight.sum()).sqrt() if len(calls) == 2 else num), den      # finite, and its gradient is not
    model, history = train(4, loss=overflows)
    assert scalers[0].get_scale() == 2. ** 9 and all(p.isfinite().all() for p in model.parameters()) and history.table.train_loss.notna().all()


class Noisy(torch.utils.data.Dataset):
    "Items that say which random number they were given."
    def __init__(self): self.rng = __import__('numpy').random.default_rng(0)

    def __len__(self): return 32

    def __getitem__(self, i): return dict(x=torch.full((6,), float(self.rng.random())), grade=torch.tensor(i % 3))


def test_processes_that_load_draw_random_numbers_of_their_own():
    "Two workers and three epochs: no number is drawn twice, the same seed draws the same ones."
    def drawn():
        seen = []
        def spy(model, batch): seen.extend(batch['x'][:, 0].tolist()); return loss(model, batch)
        fit(network(), spy, loaded(Noisy(), 8, workers=2, shuffle=True), epochs=3, lr=.01, device='cpu', progress=False, seed=4)
        return seen
    first, second = drawn(), drawn()
    assert len(first) == 96 == len(set(first)) and first == second


def test_half_precision_is_chosen_on_a_gpu_alone():
    assert pick_precision(None, torch.device('cpu')) == 'no' and pick_precision('bf16', torch.device('cpu')) == 'bf16'
