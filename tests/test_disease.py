"Diseases and readers: counts, kappas and missing labels of the real table, noise that moves labels but not their number. All of it takes 5 seconds."
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mscan import disease
from mscan.disease import COUNTS, MISSING, PREVALENCE, THRESHOLDS, degree_of, draw_disease, draw_factors, draw_missing, grade_probabilities, read_grades, reader_bound

N = 2000
FAMILY = 1e-3  # chance of a false alarm over all the numbers a test looks at together (Bonferroni)


def kappa(a, b): return cohen_kappa_score(a.ravel(), b.ravel(), weights='quadratic')


def count(grade): return (grade[..., None] == np.arange(3)).sum(0)                  # (n, 5, 5) -> (5, 5, 3)


def unlikeliest(counts, shares, n):
    "Smallest two-sided binomial p over all places and grades."
    return min(binomtest(int(k), n, p).pvalue for k, p in zip(counts.ravel(), shares.ravel(), strict=True))


@pytest.fixture(scope='module')
def people():
    "More than N: over N studies the kappa of two neighbouring canals scatters by .04, half of what is allowed."
    return draw_disease(np.random.default_rng(17), 'real', 4 * N)


@pytest.fixture(scope='module')
def grade(people): return read_grades(np.random.default_rng(18), people)


@pytest.mark.parametrize('prevalence', PREVALENCE)
def test_every_place_has_the_counts_of_its_prevalence(prevalence):
    shares = PREVALENCE[prevalence]
    shares = np.concatenate([1 - shares.sum(-1, keepdims=True), shares], -1)         # (5, 5, 3)
    counts = count(read_grades(np.random.default_rng(2), draw_disease(np.random.default_rng(1), prevalence, N)))
    assert unlikeliest(counts, shares, N) > FAMILY / counts.size
    assert unlikeliest(np.roll(counts, 1, axis=1), shares, N) < 1e-9                 # the levels off by one would be found
    assert unlikeliest(np.roll(counts, 1, axis=0), shares, N) < 1e-9                 # and so would the conditions
    if prevalence == 'real': assert np.allclose(shares * COUNTS.sum(-1, keepdims=True), COUNTS)


def test_labels_hang_together_as_the_real_ones(grade):
    canal, left_nfn, right_nfn, left_ss, right_ss = np.moveaxis(grade, 1, 0)
    got = [kappa(left_nfn, right_nfn), kappa(left_ss, right_ss), kappa(canal, left_ss), kappa(canal, right_ss), kappa(canal, left_nfn), kappa(canal, right_nfn),
           *(kappa(canal[:, k], canal[:, k + 1]) for k in range(4))]
    assert np.abs(np.subtract(got, [.44, .58, .51, .51, .27, .27, .33, .43, .37, .10])).max() < .08, np.round(got, 3)
    worst = np.bincount(canal.max(1), minlength=3) / len(canal)
    assert np.abs(worst - [.64, .175, .185]).max() < .03, worst
    assert abs(roc_auc_score((canal > 0).ravel(), np.broadcast_to((canal > 0).mean(0), canal.shape).ravel()) - .71) < .02


def test_without_its_parts_the_labels_hang_together_wrongly(people):
    "The kappas above are not those of the levels alone: shuffled patients lose them."
    shuffled = disease.Disease(people.degree, people.factor.copy(), people.degeneration, people.shares)
    shuffled.factor[:, 0] = np.random.default_rng(0).permutation(people.factor[:, 0])
    g = read_grades(np.random.default_rng(1), shuffled)
    assert kappa(g[:, 0], g[:, 3]) < .2 and kappa(g[:, 0], g[:, 1]) < .15


def test_missing_labels_at_their_rates_and_in_their_company():
    rng = np.random.default_rng(3)
    gone = np.stack([draw_missing(rng) for _ in range(N)])
    assert unlikeliest(gone.sum(0), MISSING, N) > FAMILY / 25
    assert np.allclose(np.round(MISSING * disease.STUDIES), [[1] * 5, [2] * 5, [8] * 5, [164, 82, 3, 3, 11], [161, 82, 2, 2, 7]])
    for k in (0, 1): assert (gone[:, 3, k] & gone[:, 4, k]).sum() > .75 * gone[:, 3:, k].any(1).sum()
    assert not (gone[:, 3, 1] & ~gone[:, 3, 0]).any() and (gone[:, :3] == gone[:, :3, :1]).all()


@pytest.mark.parametrize('prevalence', PREVALENCE)
def test_a_reader_without_noise_sees_the_degree(prevalence):
    people = draw_disease(np.random.default_rng(4), prevalence, 300)
    assert np.array_equal(read_grades(np.random.default_rng(5), people, 0), np.digitize(people.degree, THRESHOLDS))
    assert people.degree.min() >= 0 and people.degree.max() <= 1 and people.degeneration.min() >= 0 and people.degeneration.max() <= 1
    away = kappa(read_grades(np.random.default_rng(5), people, .11), read_grades(np.random.default_rng(5), people, 0))
    assert kappa(read_grades(np.random.default_rng(5), people, .5), read_grades(np.random.default_rng(5), people, 0)) < away < .95


@pytest.mark.parametrize('noise', (0, .11, .5, 1))
def test_noise_moves_labels_but_not_their_number(noise):
    people = draw_disease(np.random.default_rng(6), 'real', 4 * N)
    shares = COUNTS / COUNTS.sum(-1, keepdims=True)
    assert unlikeliest(count(read_grades(np.random.default_rng(7), people, noise)), shares, 4 * N) > FAMILY / shares.size


def test_degrees_are_uniform_within_a_grade():
    degree = degree_of(ndtri((np.arange(100_000) + .5) / 100_000), np.array((.2, .1)))
    assert (np.diff(degree) > 0).all()
    for low, high, share in ((0, THRESHOLDS[0], .7), (*THRESHOLDS, .2), (THRESHOLDS[1], 1, .1)):
        within = degree[(degree >= low) & (degree < high)]
        assert len(within) == pytest.approx(share * 100_000, abs=1) and np.allclose(np.histogram(within, 10, (low, high))[0], share * 10_000, atol=2)


def test_left_and_right_are_exchangeable_and_correlations_are_proper():
    factor, wear = disease._mix(np.eye(disease.PARTS))                               # what each independent part does to each place
    def correlation(order):
        through = np.concatenate([factor[:, order].reshape(disease.PARTS, 25), wear], 1)
        return through.T @ through
    own, swapped = correlation([0, 1, 2, 3, 4]), correlation([0, 2, 1, 4, 3])
    assert np.allclose(own, swapped) and np.allclose(np.diag(own), 1) and np.linalg.eigvalsh(own)[0] > .01
    assert not np.allclose(own, correlation([0, 3, 4, 1, 2]))                        # a foramen is no recess
    drawn, worn = draw_factors(np.random.default_rng(8), 20_000)
    sampled = np.corrcoef(np.concatenate([drawn.reshape(-1, 25), worn], 1).T)
    assert np.abs(sampled - own).max() < 5 / np.sqrt(20_000)                         # 435 pairs


def test_a_seed_is_a_patient_alone_or_among_many():
    many, rng = draw_disease(np.random.default_rng(9), 'demo', 5), np.random.default_rng(9)
    for k in range(5):
        one = draw_disease(rng, 'demo')
        for name in ('degree', 'factor', 'degeneration'): assert np.array_equal(getattr(one, name), getattr(many, name)[k])
    assert one.degree.shape == (5, 5) and one.degeneration.shape == (5,) and one.shares.shape == (5, 5, 2)
    first, again, other = (read_grades(np.random.default_rng(s), many) for s in (1, 1, 2))
    assert np.array_equal(first, again) and (first != other).any() and first.shape == (5, 5, 5)
    assert reader_bound('demo', 200, 3) == reader_bound('demo', 200, 3) != reader_bound('demo', 200, 4)


def test_an_unknown_prevalence_is_refused_with_the_known_ones():
    for call in (lambda: draw_disease(np.random.default_rng(0), 'rael'), lambda: reader_bound('rael', 10)):
        with pytest.raises(ValueError, match="'rael'; known: demo, real"): call()


@pytest.mark.parametrize('prevalence', PREVALENCE)
def test_nobody_beats_the_bound(prevalence):
    "Drawn labels score the ideal observer at the bound; the true grade, a distorted factor and wrong chances score worse."
    people = draw_disease(np.random.default_rng(10), prevalence, 4000)
    bound, said = reader_bound(prevalence, 4000, 10)['spinal'], read_grades(np.random.default_rng(11), people)[:, 0].ravel()
    p, weight = grade_probabilities(people.factor, people.shares)[:, 0].reshape(-1, 3), np.array([1, 2, 4])
    def auroc(score): return roc_auc_score(said > 0, score)
    def wce(answer): return np.average(-np.log(answer[np.arange(len(said)), said]), weights=weight[said])
    best = p * weight / (p * weight).sum(-1, keepdims=True)
    ill = p[:, 1:].sum(-1)
    assert abs(auroc(ill) - bound['auroc']) < .005 and abs(wce(best) - bound['wce']) < .02 and abs(wce(p) - bound['wce_unweighted']) < .02
    assert auroc(ill) > auroc(people.factor[:, 0].ravel()) > auroc(people.factor[:, 0].ravel() + np.random.default_rng(0).normal(0, .5, said.size))
    assert wce(best) < wce(p) < wce(np.clip(np.eye(3)[read_grades(np.random.default_rng(0), people, 0)[:, 0].ravel()], 1e-3, 1))
    for sharper in (.04, .25):
        wrong = grade_probabilities(people.factor, people.shares, sharper)[:, 0].reshape(-1, 3) * weight
        assert wce(best) < wce(np.clip(wrong / wrong.sum(-1, keepdims=True), 1e-9, 1))
