"What a lesson cannot show: a hang ends in a time limit."
import subprocess
import sys

AFTER_CV2 = '''
import cv2, numpy as np
from mscan.workers import pooled
image = np.random.default_rng(0).integers(0, 255, (300, 300)).astype(np.uint8)
for _ in range(200): cv2.warpAffine(cv2.createCLAHE(2, (8, 8)).apply(image), np.eye(2, 3), (1000, 1000))
def blurred(sigma): return float(cv2.GaussianBlur(image, (0, 0), sigma).std())
assert pooled(blurred, [1, 2, 3], 2, progress=False) == [blurred(s) for s in (1, 2, 3)]
'''
AFTER_TORCH = '''
import torch
from mscan.workers import pooled
torch.set_num_threads(2)
a = torch.rand(500, 500)
for _ in range(20): (a @ a).softmax(-1)
def product(k): return float((torch.ones(300, 300) @ torch.full((300, 300), float(k))).sum())
assert pooled(product, [1, 2, 3], 2, progress=False) == [product(k) for k in (1, 2, 3)]
'''


def test_workers_do_not_wait_for_threads_of_the_parent():
    "Both libraries have used their threads before the fork; the child would wait for ever."
    for script in (AFTER_CV2, AFTER_TORCH): subprocess.run([sys.executable, '-c', script], timeout=60, check=True)
