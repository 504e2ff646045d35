"The network of the benchmarks: small, trained by the project's own loop, loss and augmentation on the project's own crops."
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.utils.data import DataLoader

from mscan.encoders import CropSet, SliceEncoder, crop_loss
from mscan.metrics import FLOOR, floor_probabilities
from mscan.rsna import GRADE_WEIGHTS, GRADES
from mscan.training import fit, seed_everything

from ._common import pooled
from ._crops import SIZE_PX, SLICES


class SmallNet(nn.Module):
    "Five convolutions: some hundred crops a second and core where the project's EfficientNet does thirty."
    def __init__(self, width: int=16, dropout: float=.3):
        super().__init__()
        layers = []
        for a, b, size, stride in ((1, width, 5, 2), (width, 2 * width, 3, 2), (2 * width, 2 * width, 3, 1), (2 * width, 4 * width, 3, 2), (4 * width, 4 * width, 3, 1)):
            layers += [nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)                                                                  # (B, 4 * width, H / 8, W / 8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64 * width, len(GRADES)))

    def forward(self,
        image,  # (B, 1, H, W), grey 0..1
    ):          # (B, 1, G) logits
        return self.head(self.body((image - .3) / .25))[:, None]


def make_net(name: str, seed: int):
    "A network at its random start: 'small', or a timm name for the project's encoder."
    seed_everything(seed)
    return SmallNet() if name == 'small' else SliceEncoder(name)


@torch.no_grad()
def predict(net, images, size_px):
    "(m, G) probabilities of crops (m, M, M)."
    start, found = (images.shape[1] - size_px) // 2, []
    for k in range(0, len(images), 256):
        x = torch.from_numpy(images[k:k + 256, None, start:start + size_px, start:start + size_px].astype(np.float32) / 255)
        found.append(net.eval()(x)[:, 0].double().softmax(-1).numpy())
    return np.concatenate(found) if found else np.zeros((0, len(GRADES)))


def fit_predict(job: dict):
    "Train on one set of crops, answer for others: (m, G). Job: train (n, S, M, M), there (n, S), grade (n,), test (m, M, M), net, epochs, lr, seed."
    here = np.flatnonzero(job['there'].ravel())
    train = job['train'].reshape(-1, *job['train'].shape[2:])[here]
    grade = np.repeat(job['grade'], job['there'].shape[1])[here, None]
    net = make_net(job['net'], job['seed'])
    loader = DataLoader(CropSet(train, grade, SIZE_PX, augment=True, seed=job['seed'], shift_px=2.), batch_size=32, shuffle=True, drop_last=len(train) > 32)
    fit(net, crop_loss, loader, epochs=job['epochs'], lr=job['lr'], weight_decay=.05, seed=job['seed'], device='cpu', progress=False)
    return floor_probabilities(predict(net, job['test'], SIZE_PX))


def study_folds(study, grade, folds: int, seed: int):
    "(n,) fold of each row; rows of a study stay together, grades are spread evenly."
    fold = np.zeros(len(study), int)
    for i, (_, test) in enumerate(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(study, grade, study)): fold[test] = i
    return fold


def trainings(
    pieces: list,  # of (view, train: crops, rows to train on, test: crops, rows to answer for, seed)
    args,          # net, epochs, lr, slices, workers
) -> list:         # of (m, G), in the order of the pieces
    "Many trainings at once, one network each: it learns from the nearest slices of a level and answers for the nearest one."
    s, jobs = args.slices, []
    for view, train, rows, test, asked, seed in pieces:
        jobs.append(dict(train=getattr(train, view)[rows, :s], there=getattr(train, f'{view}_there')[rows, :s], grade=train.grade[rows], test=getattr(test, view)[asked, 0],
                         net=args.net, epochs=args.epochs, lr=args.lr, seed=seed))
    return pooled(fit_predict, jobs, args.workers, 'networks')


def blend(*views):
    "Mean of the log-probabilities (n, G) of several views, normalised."
    return floor_probabilities(np.exp(np.mean([np.log(p) for p in views], 0)))


def stacker(
    views: list,  # of (n, G) probabilities that the networks gave for studies they were not trained on
    grade,        # (n,)
):                # function: the same views of other studies -> (m, G)
    "A multinomial logistic regression of the log-probabilities, weighted 1, 2, 4: what one view or two views together can say."
    stack = lambda ps: np.concatenate([np.log(p) for p in ps], 1)
    model = LogisticRegression(C=.1, max_iter=5000).fit(stack(views), grade, sample_weight=np.asarray(GRADE_WEIGHTS)[grade])

    def answer(ps):
        p = np.full((len(ps[0]), len(GRADES)), FLOOR)
        p[:, model.classes_] = model.predict_proba(stack(ps))
        return floor_probabilities(p)
    return answer


def add_arguments(p):
    "The arguments of a benchmark that trains."
    p.add_argument('--net', default='small', help="'small', or a timm name such as tf_efficientnetv2_b0 for the project's encoder (about ten times slower)")
    p.add_argument('--epochs', type=int, default=14, help='passes over the crops')
    p.add_argument('--lr', type=float, default=3e-3, help='largest learning rate')
    p.add_argument('--slices', type=int, default=SLICES, choices=range(1, SLICES + 1), help='nearest slices of a level and view that are learned from')
    return p

