"""What the evaluations say of features, maps and models whose answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyvit.eval import look, sheet
from pyvit.eval.knn import knn_accuracy, knn_predict
from pyvit.eval.linear import linear_probe
from pyvit.eval.retrieval import part_map, recall
from pyvit.eval.zero_shot import text_classifier
from pyvit.models.registry import create_model
from pyvit.train import small  # noqa: F401  (registers the small models)


def test_neighbours_vote_by_similarity():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    labels = torch.tensor([0, 0, 1])
    scores = knn_predict(torch.tensor([[0.0, 2.0]]), bank, labels, 2, k=3, temperature=0.07)
    want = torch.stack([(((bank[:2, 1]) - 1) / 0.07).exp().sum(), torch.tensor(1.0)])
    torch.testing.assert_close(scores[0], want)
    assert knn_accuracy((bank, labels), (bank, labels), k=1) == 100
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        knn_predict(bank, bank, labels, 2, k=4)


def test_linear_probe_separates_what_is_separable_and_nothing_else():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (600,))
    clear, noise = F.one_hot(labels, 4) + 0.1 * torch.randn(600, 4), torch.randn(600, 4)
    assert linear_probe((clear[:400], labels[:400]), (clear[400:], labels[400:]), epochs=10)["linear"] == 100
    assert linear_probe((noise[:400], labels[:400]), (noise[400:], labels[400:]), epochs=10)["linear"] < 40


def test_recall():
    similar = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.3, 0.2, 0.9]])
    found = recall(similar, torch.eye(3, dtype=torch.bool), (1, 2, 3))
    assert found == pytest.approx({1: 200 / 3, 2: 200 / 3, 3: 100})


def test_part_map_is_the_class_token_that_attends_to_one_patch():
    """With one block and all attention on patch p, the model's own embedding must match the map at p."""
    torch.manual_seed(0)
    model = create_model("clip_pico_patch8_32", depth=1, vocab_size=50, context_length=8).eval()
    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        maps = part_map(model, images, text)
        values = lambda module, inputs, qkv: torch.cat([qkv[..., :192], qkv[:, 6:7, 192:].expand(-1, 17, -1)], -1)  # noqa: E731
        hook = model.visual.blocks[0].attn.qkv.register_forward_hook(values)  # every token carries patch 5's value
        alone = (model.encode_image(images) * model.encode_text(text)).sum(1)
        hook.remove()
    torch.testing.assert_close(maps.flatten(1)[:, 5], alone, rtol=1e-4, atol=1e-5)


def test_mass_threshold_keeps_the_fewest_cells():
    maps = torch.tensor([[[0.5, 0.3], [0.15, 0.05]]])
    assert look.keep_mass(maps, 0.6).tolist() == [[[True, True], [False, False]]]
    assert look.keep_mass(maps, 0.5).sum() == 1
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\]"):
        look.keep_mass(maps, 0.0)


def test_principal_components_colour_what_differs():
    features = torch.zeros(1, 2, 2, 5)
    features[0, 0] = 1.0
    colors = look.pca_colors(features)
    assert colors.shape == (1, 3, 2, 2)
    assert torch.allclose(colors[0, :, 0, 0], colors[0, :, 0, 1])
    assert (colors[0, 0, 0, 0] - colors[0, 0, 1, 0]).abs() > 0.4


def test_templates_must_have_a_place_for_the_name():
    with pytest.raises(ValueError, match="templates must each contain"):
        text_classifier(torch.nn.Linear(1, 1), lambda t: t, ["a"], ["no place"])


@pytest.mark.parametrize("channels", [1, 3])
def test_sheets_are_pictures(tmp_path, channels):
    images = torch.rand(3, channels, 8, 8)
    ranked = [[("a", 0.7), ("b", 0.3)]] * 3
    paths = [
        sheet.save_guesses(tmp_path / "guesses.png", images, ["a", "b", "a"], ranked, "guesses"),
        sheet.save_sheet(tmp_path / "sheet.png", [("image", images)], ["one", "two", "three"], "sheet"),
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
