"""`verify_tree`: accept a path through a tree of drafted tokens and emit one token more, exactly by
the target's distribution."""

from __future__ import annotations

from torch import Tensor

from ..checks import PLAIN, check_increasing, check_shape, columns, device_of, kind_of, random_key
from ..fields import Sizes
from ..inputs import TREE_RULES, VerifyTreeInputs
from ..trees import Tree, VerifiedTree
from .registry import Op

OP = Op("verify_tree", VerifyTreeInputs, VerifiedTree, workspace=True)


def verify_tree(
    target_logits: Tensor,
    tree: Tree,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    rule: str = "rejection",
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    position: int | Tensor | None = None,
    words: Tensor | None = None,
    backend: str | None = None,
    out: VerifiedTree | None = None,
    workspace: Tensor | None = None,
) -> VerifiedTree:
    """Verify a tree of drafted tokens of each sequence against the target's logits.

    Rule "rejection" (recursive rejection sampling: SpecInfer 2305.09781, 2402.14160): a node's
    children are tried in order. Drafted token x is accepted iff u q(x) < p(x), and verification
    goes on behind it; otherwise p becomes (p - q)+, scaled to sum to 1, for the next child. Behind
    the last child one token is drawn from what is left of p. Where the tree is a chain, this is
    `verify`'s rule "token", bit for bit.

    Rule "walk": the target's own token is drawn at each node, and verification goes on behind the
    child that has it, if there is one. It uses no q. "greedy" is the same at temperature 0. Rule
    "coupled" draws it as `verify`'s coupled rule does, with noise of the sequence's seed, the
    absolute position and the token: the text is, token for token, what decoding without drafts
    gives with the same seed.

    Emitted tokens follow the target's distribution exactly. Rows of nodes that are not reached are
    not read.

    Args:
        target_logits: [B, N + 1, V] f32, bf16 or f16, any strides with contiguous rows; row 0 is
            the target's distribution behind the root, row n + 1 that behind node n. V < 2^19.
        tree: Tree of [B, N] nodes. N = 0 is plain sampling. Under "rejection" each recorded token
            has to be drawn from its record whatever was drawn before, and neither the places of the
            tree nor which of them hold a node may depend on the token drawn there. Other tokens, as
            the likeliest ones, are bare guesses. The other rules take any tree.
        temperature, top_k, top_p, min_p: of the target's distribution, a number or a tensor [B];
            see `row_distribution`. Greedy and sampled sequences may be mixed.
        rule: "rejection", "walk", "coupled" or "greedy".
        seed, round: as in `verify`.
        position: i64 [B] or an integer, absolute position of the token behind the root; in place of
            `round` under the coupled rule.
        words: i64 [B, N + 1] random words in place of seed and round. "rejection": one for the
            acceptance of each node, the last for the token that ends the round; "walk": one for
            each row of logits. Coupled: [B, N + 1, V], by depth and token.
        backend, out, workspace: as in `row_distribution`.

    Returns:
        VerifiedTree(accepted i64 [B], emitted i64 [B, N + 1], path i64 [B, N + 1], status i32 [B]).
        `commit(lengths, emitted, path=path, caches=...)` makes the path contiguous in caches that
        hold the root and node n at positions lengths and lengths + 1 + n.

        Status TOKEN: a token or record is out of range, a parent is neither the root nor a node
        before its child, or siblings are equal though drawn without replacement. DRAFT: a recorded
        token that was tried has no weight in what its record says it was drawn from.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range.
        BackendError: a forced backend cannot run.

    Example:
        >>> tree = Tree.guesses(torch.tensor([[1, 0, 1]]), torch.tensor([[-1, -1, 1]]))
        >>> target = torch.tensor([[[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
        >>> verified = verify_tree(target, tree, rule="greedy")
        >>> verified.emitted.tolist(), verified.path.tolist()
        ([[0, 1, 0, -1]], [[0, 2, 3, -1]])
    """
    if rule not in TREE_RULES:
        raise ValueError(f"rule: expected one of {', '.join(TREE_RULES)}, got {rule!r}")
    check_tree(tree)
    if position is not None and rule != "coupled":
        raise ValueError(f"position: only the coupled rule takes one, got one under {rule!r}")
    device, N = device_of("target_logits", target_logits), tree.tokens.shape[1]
    if target_logits.ndim != 3 or target_logits.shape[1] != N + 1:
        raise ValueError(
            f"target_logits: expected shape [B, N+1={N + 1}, V], got {list(target_logits.shape)}; "
            f"it needs a row for the root and one for each of the tree's N={N} nodes"
        )
    B, _, V = target_logits.shape
    sizes: Sizes = {"B": B, "N": N, "N1": N + 1, "V": V}
    sizes["Vd"] = columns("tree.draft_ids", tree.draft_ids, V, device)
    sizes["words"] = (B, N + 1, V) if rule == "coupled" else (B, N + 1)
    if rule == "greedy":
        temperature = 0.0
    if words is None and rule == "coupled":
        seed, position = random_key(B, temperature, seed=seed, position=position)
    elif words is None:
        seed, round = random_key(B, temperature, seed=seed, round=round)
    inputs = OP.check(
        sizes,
        device,
        target_logits,
        tree,
        rule,
        (temperature, top_k, top_p, min_p),
        (words, seed, round, position),
    )
    if tree.draft_ids is not None:
        check_increasing("tree.draft_ids", tree.draft_ids, V)
    return OP(inputs, sizes, device, backend, out, workspace)


def check_tree(tree: Tree) -> None:
    """Raise unless it is a tree of tokens [B, N] whose logits come with their distribution."""
    if not isinstance(tree, Tree):
        raise TypeError(
            f"tree: expected a Tree, got {kind_of(tree)}; Tree.guesses(tokens, parents) makes one "
            "of tokens alone"
        )
    if type(tree.tokens) not in PLAIN or tree.tokens.ndim != 2:
        check_shape("tree.tokens", tree.tokens, (None, None), ("B", "N"))
    if (tree.logits is None) != (tree.distribution is None):
        raise ValueError(
            "tree: expected logits and distribution together, or neither; got one of them"
        )
