"""Which tokens: scores on known values, and what holds for all of them."""

from __future__ import annotations

import pytest
import torch

from diffcache.token_rows import blend_clusters, joint_tokens, put_rows, take_rows
from diffcache.token_scores import (
    TOKEN_SCORES,
    TokenView,
    aged,
    cluster_tokens,
    score_tokens,
    select_tokens,
    token_score,
    with_spatial_bonus,
)

OPTIONS = {"toca": {"interval": 3}}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(batch: int = 2, step: int = 3) -> TokenView:
    value = drawn(batch, 16, 8)
    return TokenView(
        value, step, before=drawn(batch, 16, 8, seed=1), attended=drawn(batch, 2, 16, 4, seed=2),
        stale=torch.arange(16).expand(batch, 16), clusters=cluster_tokens(value, 4), grid=(4, 4),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOKEN_SCORES))
def test_a_score_is_deterministic_and_looks_at_one_sample(name: str) -> None:
    options, both = OPTIONS.get(name, {}), view()
    scores = score_tokens(name, both, **options)
    assert scores.shape == (2, 16)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, score_tokens(name, view(), **options))
    one = TokenView(both.value[1:], 3, both.before[1:], both.attended[1:], both.stale[1:], both.clusters[1:], (4, 4))  # type: ignore[index]
    assert torch.equal(score_tokens(name, one, **options), scores[1:])


@pytest.mark.parametrize("name", sorted(TOKEN_SCORES))
def test_a_choice_is_distinct_tokens_in_order(name: str) -> None:
    tokens = select_tokens(score_tokens(name, view(), **OPTIONS.get(name, {})), 5)
    assert tokens.shape == (2, 5)
    assert tokens.dtype == torch.int64
    assert (tokens.diff(dim=1) > 0).all()
    assert (tokens >= 0).all()
    assert (tokens < 16).all()


def test_selection_takes_the_highest_and_the_first_of_equals() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert select_tokens(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert select_tokens(scores, 4).tolist() == [[0, 1, 2, 3]] * 2
    for count in (0, 5):
        with pytest.raises(ValueError, match="of 4 tokens are to be selected"):
            select_tokens(scores, count)


def test_norms() -> None:
    value = torch.zeros(1, 3, 2)
    value[0, 1], value[0, 2] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    assert score_tokens("norm", TokenView(value, 0)).tolist() == [[0.0, 5.0, 1.0]]
    assert score_tokens("norm", TokenView(value, 0), largest=False).tolist() == [[0.0, -5.0, -1.0]]
    attended = score_tokens("attended_norm", TokenView(value, 0, attended=value[:, None]))
    assert torch.allclose(attended, torch.tensor([[1.0, 0.0, 0.8]]))
    moved = score_tokens("change", TokenView(value, 0, before=value * 0))
    assert moved.tolist() == [[0.0, 25.0, 1.0]]


def test_what_waited_longest_wins_in_the_end() -> None:
    """With staleness every token's turn comes."""
    value, stale, seen = drawn(1, 16, 4), torch.zeros(1, 16, dtype=torch.int64), set()
    for step in range(12):
        scores = score_tokens("toca", TokenView(value, step, stale=stale), interval=2, weight=1.0)
        tokens = select_tokens(scores, 4)
        stale = aged(stale, tokens)
        seen |= set(tokens[0].tolist())
    assert seen == set(range(16))
    assert int(stale.max()) <= 12


def test_the_spatial_bonus_goes_to_the_best_of_each_cell() -> None:
    scores = drawn(2, 15)
    got = with_spatial_bonus(scores, (3, 5), cell=2, bonus=10.0) - scores > 5
    cells = [[(y, x) for y in range(a, min(a + 2, 3)) for x in range(b, min(b + 2, 5))]
             for a in (0, 2) for b in (0, 2, 4)]  # fmt: skip
    for sample in range(2):
        best = {max(cell, key=lambda at: float(scores[sample, 5 * at[0] + at[1]])) for cell in cells}
        assert {(i // 5, i % 5) for i in range(15) if got[sample, i]} == best
    with pytest.raises(ValueError, match="does not hold 15 tokens"):
        with_spatial_bonus(scores, (4, 4))


def test_clusters_are_those_of_the_data_and_each_gives_one_token() -> None:
    centres = 20 * drawn(2, 4, 8)
    truth = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(s)) % 4 for s in range(2)])
    value = centres.gather(1, truth[..., None].expand(2, 24, 8)) + 0.1 * drawn(2, 24, 8, seed=5)
    found = cluster_tokens(value, 8)
    for sample in range(2):  # no cluster holds two of the data's
        pairs = {(int(a), int(b)) for a, b in zip(found[sample], truth[sample], strict=True)}
        assert len(pairs) == len({a for a, _ in pairs})
    chosen = [select_tokens(score_tokens("cluster", TokenView(value, step, clusters=truth)), 4) for step in range(8)]
    for tokens in chosen:
        assert all(set(truth[s, tokens[s]].tolist()) == {0, 1, 2, 3} for s in range(2))
    assert len({tuple(tokens[0].tolist()) for tokens in chosen}) > 4  # others at other steps
    assert torch.equal(cluster_tokens(value, 8, start=found, iterations=2), cluster_tokens(value, 8, iterations=12))
    with pytest.raises(ValueError, match="cannot be 25 clusters"):
        cluster_tokens(value, 25)


def test_blending_moves_a_cluster_towards_its_fresh_mean() -> None:
    kept, rows, tokens = drawn(2, 6, 3), drawn(2, 2, 3, seed=1), torch.tensor([[0, 3], [1, 4]])
    clusters = torch.tensor([[0, 0, 1, 1, 1, 2]]).expand(2, 6)
    mixed = put_rows(kept, tokens, rows, 1)
    assert torch.equal(blend_clusters(mixed, tokens, rows, clusters, 0.0, 3), mixed)
    got = blend_clusters(mixed, tokens, rows, clusters, 0.25, 3)
    assert torch.equal(take_rows(got, tokens, 1), rows)
    assert torch.equal(got[:, 5], kept[:, 5])
    assert torch.allclose(got[0, 1], 0.25 * rows[0, 0] + 0.75 * kept[0, 1])
    assert torch.allclose(got[1, 2], 0.25 * rows[1, 1] + 0.75 * kept[1, 2])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_rows_are_taken_and_put_back_in_any_layout(order: tuple[int, ...]) -> None:
    value = drawn(2, 6, 3).permute(order).contiguous().permute([order.index(a) for a in range(3)])
    tokens, every = torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.arange(6).expand(2, 6)
    rows = take_rows(value, tokens, 1)
    assert torch.equal(rows, torch.stack([value[s, tokens[s]] for s in range(2)]))
    whole = take_rows(value, every, 1)
    assert torch.equal(whole, value)
    assert whole.stride() == value.stride()
    back = put_rows(value * 0, tokens, rows, 1)
    assert torch.equal(take_rows(back, tokens, 1), rows)
    assert back.ne(0).any(-1).sum() == 6
    assert torch.equal(put_rows(back, every, value, 1), value)


def test_rows_of_tables_and_of_folded_heads() -> None:
    tokens = torch.tensor([[0, 2], [1, 3]])
    table = drawn(4, 3)
    rows = take_rows(table, tokens, 1, (0, 1), 3)
    assert torch.equal(rows, table[tokens])
    rotary = drawn(1, 4, 1, 3)
    assert torch.equal(take_rows(rotary, tokens, 1, (0, 1), 4)[:, :, 0], rotary[0, :, 0][tokens])
    heads = drawn(6, 4, 3)  # two samples of three heads
    taken = take_rows(heads, tokens, 1, (0, 3))
    assert torch.equal(taken, torch.stack([heads[i, tokens[i // 3]] for i in range(6)]))
    late = drawn(4, 2, 3)  # tokens before samples
    assert torch.equal(take_rows(late, tokens, 0, (1, 1)), torch.stack([late[tokens[s], s] for s in range(2)], 1))


def test_token_numbers_of_a_joint_sequence() -> None:
    tokens = torch.tensor([[0, 2], [1, 3]])
    assert joint_tokens([None, tokens, None], [2, 4, 1]).tolist() == [[0, 1, 2, 4, 6], [0, 1, 3, 5, 6]]


def test_what_a_score_cannot_do_is_said() -> None:
    bare = TokenView(drawn(1, 4, 2), 0)
    with pytest.raises(ValueError, match="unknown token score 'nrom'; known"):
        score_tokens("nrom", bare)
    with pytest.raises(ValueError, match=r"takes .*largest"):
        score_tokens("norm", bare, smallest=True)
    for name, what in (("change", "before"), ("attended_norm", "attended"), ("cluster", "clusters")):
        with pytest.raises(ValueError, match=f"looks at '{what}', which this view lacks"):
            score_tokens(name, bare)
    with pytest.raises(ValueError, match="'norm' is registered already"):
        token_score("norm")(lambda view: view.value)
