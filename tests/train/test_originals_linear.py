"""The linear probe beside MAE's (He et al., 2022, appendix A.1), and k-NN beside DINO's (Caron et al., 2021)."""

import math

import pytest
import torch

from pyvit.eval.features import embed
from pyvit.eval.knn import knn_accuracy, knn_predict
from pyvit.train import train
from pyvit.train.config import Config
from tests.train.originals import LARS, Original, compare, cosine, run_of


def test_linear_probe(tmp_path):
    """LARS without decay, rate 0.1 x batch / 256, a batch norm without affine parameters, frozen features."""
    tiny = {"data": "synthetic", "image_size": 32, "batch_size": 16, "steps": 1}
    decoder = ["decoder_dim=16", "decoder_depth=1", "decoder_heads=1"]
    settings = {"model": "vit_pico_patch8_32", "set": ["depth=1", "embed_dim=24", "num_heads=2"]}
    train(Config(recipe="mae", option=decoder, out=str(tmp_path / "mae"), **settings, **tiny))
    run = run_of(
        tmp_path / "run", recipe="linear", init=str(tmp_path / "mae"), model=None, batch_size=64, warmup=0.2, steps=20
    )
    assert float(run.recipe.head.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    frozen = run.recipe.model
    before = {name: p.clone() for name, p in frozen.state_dict().items()}

    def loss(p, views):
        x = embed(frozen, views["images"]).detach()  # the class token after the last norm
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
        logits = x @ p["head.weight"].T + p["head.bias"]
        return -logits.log_softmax(1)[range(len(x)), views["labels"]].mean()

    trained = {name: p for name, p in run.recipe.named_parameters() if p.requires_grad}
    assert set(trained) == {"head.weight", "head.bias"}
    original = Original(
        trained, loss, lambda name, p: (1.0, 0.0, p.dim() > 1), lambda step: cosine(step, 20, 0.1 * 64 / 256, 0.0, 4),
        LARS(),
    )  # fmt: skip
    compare(run, original)
    assert all(torch.equal(p, before[name]) for name, p in frozen.state_dict().items())


@pytest.mark.parametrize("k", [10, 20])
def test_knn(k):
    """Votes of the k most similar training features, weighted by exp(cosine / 0.07)."""
    torch.manual_seed(0)
    bank, labels = torch.randn(60, 5), torch.randint(0, 4, (60,))
    queries, truth = torch.randn(30, 5), torch.randint(0, 4, (30,))
    hits = 0
    found = knn_predict(queries, bank, labels, 4, k)
    for i, query in enumerate(queries.double()):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        nearest = sorted(range(60), key=lambda n: -cosines[n])[:k]
        votes = [0.0] * 4
        for n in nearest:
            votes[int(labels[n])] += math.exp(cosines[n] / 0.07)
        total = sum(votes)
        assert (found[i] / found[i].sum()).tolist() == pytest.approx([v / total for v in votes], abs=1e-5)
        hits += votes.index(max(votes)) == int(truth[i])
    assert knn_accuracy((bank, labels), (queries, truth), k) == pytest.approx(100 * hits / 30)
