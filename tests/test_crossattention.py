"""Properties of the multi-view model, and for each a mutant that breaks it.

A check takes a way to make a model and fails by AssertionError. The model passes all of them; a mutant must fail the check
that is named for it. Everything runs on random 64-d features, in seconds.
"""
import copy

import pytest
import torch
from torch import nn

from mscan.crossattention import MODELS, PROBES, CrossAttention, MScan, SpatialDropout, build_model, fill_absent, probe

B, T, S, D, H = 4, 5, 3, 64, 2
CLOSE = dict(atol=2e-6, rtol=1e-5)  # float32 sums in another order


def features(seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, T, D, generator=g), torch.randn(batch, T, S, D, generator=g)


def masks(seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, T, generator=g) > .3, torch.rand(batch, T, S, generator=g) > .3


def make_mscan(**options):
    torch.manual_seed(0)
    return build_model('mscan', **{'dim': D, 'heads': H} | options).eval()


def bypassed(make):
    "The model without its Bi-GRUs: nothing is left that mixes levels but the attention."
    model = make()
    model.gru_s = model.gru_a = nn.Identity()
    return model


# ---- checks ---------------------------------------------------------------------------------------------------------------------

def check_key_reaches_other_levels(make):
    "Proof (a): with both Bi-GRUs bypassed, changing key level k changes output level j != k, for both attentions."
    model, (s, a) = bypassed(make), features()
    for level in range(T):
        s_changed, a_changed = s.clone(), a.clone()
        s_changed[:, level] += 1
        a_changed[:, level] += 1
        with torch.no_grad():
            base = model(s, a)
            by_s = (model(s_changed, a) - base).abs().amax((0, 2, 3)) > 1e-6
            by_a = (model(s, a_changed) - base).abs().amax((0, 2, 3)) > 1e-6
        assert by_s.all() and by_a.all(), f'level {level} reaches {by_s.tolist()} and {by_a.tolist()}'


def check_weights_are_levels_by_levels(make):
    "Proof (b): weights are (B, heads, 5, 5), sum to 1 over present keys, and are 0 on absent ones."
    model, (s, a), (s_mask, a_mask) = make(), features(), masks()
    s_mask[0], a_mask[1] = False, False
    with torch.no_grad():
        _, attention = model(s, a, s_mask, a_mask, return_attention=True)
    for w, keys in zip((attention['axial_to_sagittal'], attention['sagittal_to_axial']), (s_mask, a_mask.any(-1))):
        assert w.shape == (B, H, T, T)
        total = keys.any(-1).float()[:, None, None].expand(B, H, T)
        assert torch.allclose(w.sum(-1), total, atol=1e-6)
        assert (w.masked_select(~keys[:, None, None, :].expand_as(w)) == 0).all()
        assert (w >= 0).all()


def check_weights_follow_query(make):
    "Another query gives other weights at that level, and at that level only."
    model, (s, a) = bypassed(make), features()
    changed = a.clone()
    changed[:, 2] = -changed[:, 2]
    with torch.no_grad():
        before = model(s, a, return_attention=True)[1]['axial_to_sagittal']
        after = model(s, changed, return_attention=True)[1]['axial_to_sagittal']
    moved = (after - before).abs().amax((0, 1, 3)) > 1e-6
    assert moved.tolist() == [False, False, True, False, False]


def check_weights_follow_key(make):
    "Another key gives other weights."
    model, (s, a) = bypassed(make), features()
    changed = s.clone()
    changed[:, 2] = -changed[:, 2]
    with torch.no_grad():
        before = model(s, a, return_attention=True)[1]['axial_to_sagittal']
        after = model(changed, a, return_attention=True)[1]['axial_to_sagittal']
    assert ((after - before).abs().amax((0, 1, 2))[2] > 1e-6).all()


def check_queries_and_keys_are_of_different_views(make):
    "Both weights move with either view: a view that attends to itself does not hear the other."
    model, (s, a) = bypassed(make), features()
    other_s, other_a = features(seed=1)
    with torch.no_grad():
        base = model(s, a, return_attention=True)[1]
        by_s = model(other_s, a, return_attention=True)[1]
        by_a = model(s, other_a, return_attention=True)[1]
    for name in base:
        assert (base[name] - by_s[name]).abs().max() > 1e-6, f'{name} does not hear the sagittal view'
        assert (base[name] - by_a[name]).abs().max() > 1e-6, f'{name} does not hear the axial view'


def check_batch_permutes(make):
    "The order of the batch changes no study's result."
    model, (s, a), (s_mask, a_mask) = make(), features(), masks()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        batch, permuted = model(s, a, s_mask, a_mask), model(s[order], a[order], s_mask[order], a_mask[order])
    assert torch.allclose(batch[order], permuted, **CLOSE)


def check_batch_is_singles(make):
    "A batch of N is N batches of one."
    model, (s, a), (s_mask, a_mask) = make(), features(), masks()
    with torch.no_grad():
        batch = model(s, a, s_mask, a_mask)
        singles = torch.cat([model(s[i:i+1], a[i:i+1], s_mask[i:i+1], a_mask[i:i+1]) for i in range(B)])
    assert torch.allclose(batch, singles, **CLOSE)


def check_absent_is_silent(make):
    "What stands at an absent level or slice, NaN included, changes no output bit, here or elsewhere."
    model, (s, a), (s_mask, a_mask) = make(), features(), masks()
    assert not s_mask.all() and not a_mask.all()
    s_junk, a_junk = s.clone(), a.clone()
    s_junk[~s_mask], a_junk[~a_mask] = float('nan'), float('inf')
    with torch.no_grad():
        assert torch.equal(model(s, a, s_mask, a_mask), model(s_junk, a_junk, s_mask, a_mask))


def check_absent_key_gives_nothing(make):
    "With GRUs bypassed, masking key level k equals a softmax without it: a zero vector as key would still draw weight."
    model, (s, a) = bypassed(make), features()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 1] = False
    with torch.no_grad():
        w = model(s, a, mask, return_attention=True)[1]['axial_to_sagittal']
        full = model(s, a, return_attention=True)[1]['axial_to_sagittal']
    rest = full.clone()
    rest[..., 1] = 0
    assert torch.allclose(w, rest / rest.sum(-1, keepdim=True), **CLOSE)


def check_head_has_its_own_level(make):
    "With GRUs bypassed and identity weights, the logits of level t depend on level t alone, and on a head of its own."
    model, (s, a) = bypassed(make), features()
    with probe(model, 'identity'), torch.no_grad():
        base = model(s, a)
        for level in range(T):
            changed = s.clone()
            changed[:, level] += 1
            moved = (model(changed, a) - base).abs().amax((0, 2, 3)) > 1e-6
            assert moved.tolist() == [t == level for t in range(T)]
        same = s[:, :1].expand_as(s), a[:, :1].expand_as(a)  # the same crop at all levels: only the heads differ
        assert (model(*same).std(1) > 1e-4).all()


def check_slices_are_a_sequence(make):
    "Reversing the three slices of a level changes its result; repeating a slice under a mask does not."
    model, (s, a) = make(), features()
    mask = torch.ones(B, T, S, dtype=torch.bool)
    mask[:, :, 2] = False
    repeated = a.clone()
    repeated[:, :, 2] = repeated[:, :, 1]
    with torch.no_grad():
        assert (model(s, a) - model(s, a.flip(2))).abs().max() > 1e-5
        assert torch.equal(model(s, a, None, mask), model(s, repeated, None, mask))
        assert (model(s, repeated) - model(s, repeated, None, mask)).abs().max() > 1e-5


def check_dropout_takes_whole_channels(make):
    "In training a feature is dropped at all five levels of a study or at none; in use nothing is dropped."
    dropout = make().dropout
    dropout.train()
    torch.manual_seed(0)
    gone = dropout(torch.ones(8, T, 200)) == 0
    assert (gone.all(1) == gone.any(1)).all()
    assert .05 < gone.float().mean() < .2
    assert (gone[0] != gone[1]).any(), 'studies draw for themselves'
    dropout.eval()
    assert (dropout(torch.ones(2, T, 8)) == 1).all()


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith('check_')}


@pytest.mark.parametrize('check', CHECKS)
def test_mscan(check):
    CHECKS[check](make_mscan)


@pytest.mark.parametrize('check', [name for name in CHECKS if 'view' not in name and 'own_level' not in name])
def test_mscan_residual(check):
    CHECKS[check](lambda: make_mscan(residual=True))


# ---- mutants --------------------------------------------------------------------------------------------------------------------

class LengthOneAxis(CrossAttention):
    "Attends over an axis of length one, as the released code does with its (1, 5, 512)."
    def forward(self, query, key, value, present):
        fold = lambda x: x.flatten(0, 1)[:, None]
        answer, weights = super().forward(fold(query), fold(key), fold(value), present.flatten()[:, None])
        return answer[:, 0].unflatten(0, query.shape[:2]), weights


class OverTheBatch(nn.Module):
    "PyTorch's block without batch_first on (B, T, D): attends over the studies."
    def __init__(self):
        super().__init__()
        self.block = nn.MultiheadAttention(D, H)

    def forward(self, query, key, value, present):
        return self.block(query, key, value, average_attn_weights=False)


class BlindToMasks(CrossAttention):
    def weigh(self, query, key, present): return super().weigh(query, key, torch.ones_like(present))


class BatchOfOneSlices(nn.Module):
    "Takes slices 3t to 3t + 3 of the flattened batch for level t, as the released code does: right for one study only."
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm.lstm

    def forward(self, e, present):
        flat = e.flatten(0, 2)
        h = torch.stack([self.lstm(flat[t * 3:t * 3 + 3][None])[0][0, -1] for t in range(T)])
        return h.expand(len(e), T, D)


class MeanOfSlices(nn.Module):
    def forward(self, e, present): return (e * present[..., None]).sum(2) / present.sum(-1, keepdim=True).clamp(min=1)


class LastLevelOnly(nn.Module):
    "One linear layer on the last level's vector for all levels, as in the released code."
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2 * D, T * 3)

    def forward(self, o): return self.fc(o[:, -1]).view(-1, T, 1, 3)


class SharedHead(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.fully_connected, self.head = heads.fully_connected, heads.heads[0]

    def forward(self, o): return self.head(self.fully_connected(o)).unflatten(-1, (1, 3))


class SelfAttention(CrossAttention):
    def weigh(self, query, key, present): return super().weigh(query, query, present)


def both(cls):
    def mutate(model):
        for name in ('attention_1', 'attention_2'):
            old, new = getattr(model, name), cls()
            if isinstance(new, CrossAttention): new.load_state_dict(old.state_dict())
            setattr(model, name, new)
    return mutate


def weights(kind):
    def mutate(model):
        for attention in (model.attention_1, model.attention_2):
            attention.weigh = lambda q, k, present, attention=attention: PROBES[kind](attention, q, k, present)
    return mutate


def zero_by_product(model):
    "Zeroes absent entries by multiplication: NaN * 0 is NaN."
    inner = model.forward
    def forward(s, a, s_mask=None, a_mask=None, **kw):
        if s_mask is not None: s = s * s_mask[..., None]
        if a_mask is not None: a = a * a_mask[..., None]
        return inner(s, a, None, None, **kw)
    model.forward = forward


MUTANTS = {  # name: (what is done to the model, the check that must fail)
    'length_one_axis': (both(lambda: LengthOneAxis(D, H)), 'check_key_reaches_other_levels'),
    'length_one_axis_shape': (both(lambda: LengthOneAxis(D, H)), 'check_weights_are_levels_by_levels'),
    'identity_weights': (weights('identity'), 'check_key_reaches_other_levels'),
    'uniform_weights': (weights('uniform'), 'check_weights_follow_query'),
    'uniform_weights_key': (weights('uniform'), 'check_weights_follow_key'),
    'other_study_weights': (weights('other_study'), 'check_batch_is_singles'),
    'self_attention': (both(lambda: SelfAttention(D, H)), 'check_queries_and_keys_are_of_different_views'),
    'attention_over_the_batch': (both(OverTheBatch), 'check_batch_is_singles'),
    'blind_to_masks': (both(lambda: BlindToMasks(D, H)), 'check_absent_key_gives_nothing'),
    'blind_to_masks_sum': (both(lambda: BlindToMasks(D, H)), 'check_weights_are_levels_by_levels'),
    'zero_by_product': (zero_by_product, 'check_absent_is_silent'),
    'slices_of_a_batch_of_one': (lambda m: setattr(m, 'lstm_a', BatchOfOneSlices(m.lstm_a)), 'check_batch_permutes'),
    'mean_of_slices': (lambda m: setattr(m, 'lstm_a', MeanOfSlices()), 'check_slices_are_a_sequence'),
    'last_level_only': (lambda m: setattr(m, 'heads', LastLevelOnly()), 'check_head_has_its_own_level'),
    'shared_head': (lambda m: setattr(m, 'heads', SharedHead(m.heads)), 'check_head_has_its_own_level'),
    'element_dropout': (lambda m: setattr(m, 'dropout', nn.Dropout(.1)), 'check_dropout_takes_whole_channels'),
}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutant_fails(mutant):
    mutate, check = MUTANTS[mutant]
    def make():
        model = make_mscan()
        mutate(model)
        return model.eval()
    with pytest.raises(AssertionError):
        CHECKS[check](make)


# ---- the rest -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('case', ['level', 'slice', 'sagittal', 'axial', 'both'])
def test_missing_views_stay_finite_forwards_and_backwards(name, case):
    torch.manual_seed(0)
    model, (s, a) = build_model(name, dim=D), features()
    s_mask, a_mask = torch.ones(B, T, dtype=torch.bool), torch.ones(B, T, S, dtype=torch.bool)
    if case == 'level': s_mask[0, 2], a_mask[0, 4] = False, False
    if case == 'slice': a_mask[0, 2, 0] = False
    if case in ('sagittal', 'both'): s_mask[0] = False
    if case in ('axial', 'both'): a_mask[0] = False
    s[~s_mask], a[~a_mask] = float('nan'), float('nan')
    logits = model(s, a, s_mask, a_mask)
    assert logits.shape == (B, T, 1, 3) and logits.isfinite().all()
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_learns(name):
    model, (s, a) = build_model(name, dim=D, dropout=0.), features()
    model(s, a).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert all(n.endswith('k.bias') for n in idle), idle  # a key's bias shifts all scores of a query alike: softmax ignores it


@pytest.mark.parametrize('name', MODELS)
def test_config_rebuilds_the_model(name):
    model = build_model(name, dim=D, conditions=5, grades=3).eval()
    again = build_model(**model.config).eval()
    again.load_state_dict(model.state_dict())
    s, a = features()
    with torch.no_grad():
        assert torch.equal(model(s, a), again(s, a)) and model(s, a).shape == (B, T, 5, 3)
        logits, attention = model(s, a, return_attention=True)
        assert torch.equal(logits, model(s, a)) and isinstance(attention, dict)


def test_paper_sizes():
    model = MScan()
    assert model.gru_s.gru.hidden_size == model.gru_a.gru.hidden_size == model.lstm_a.lstm.hidden_size == 256
    assert model.heads.fully_connected[0].in_features == 1024 and len(model.heads.heads) == 5


def test_bfloat16_stays_finite():
    model, (s, a), (s_mask, a_mask) = make_mscan(), features(), masks()
    s_mask[0], a_mask[1] = False, False
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert model(s, a, s_mask, a_mask).isfinite().all()


def test_probe_leaves_the_model_as_it_was():
    model, (s, a) = make_mscan(), features()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(s, a)
        for kind in PROBES:
            with probe(model, kind):
                assert not torch.allclose(model(s, a), before, atol=1e-6)
        with pytest.raises(RuntimeError), probe(model, 'uniform'):
            raise RuntimeError
        assert torch.equal(model(s, a), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_probes_keep_to_present_keys():
    model, (s, a), (s_mask, a_mask) = make_mscan(), features(), masks()
    for kind in PROBES:
        with probe(model, kind), torch.no_grad():
            w = model(s, a, s_mask, a_mask, return_attention=True)[1]['axial_to_sagittal']
        assert (w.masked_select(~s_mask[:, None, None].expand_as(w)) == 0).all()


def test_clear_errors():
    with pytest.raises(ValueError, match='no model'): build_model('resnet')
    with pytest.raises(ValueError, match='heads'): build_model('sagittal_gru', heads=2)
    with pytest.raises(ValueError, match='heads'): CrossAttention(64, heads=5)
    with pytest.raises(ValueError, match='mask'): fill_absent(torch.zeros(2, 5, 8), torch.ones(2, 3))


def test_spatial_dropout_keeps_the_mean():
    torch.manual_seed(0)
    dropout = SpatialDropout(.5).train()
    assert abs(dropout(torch.ones(64, T, 256)).mean() - 1) < .05
