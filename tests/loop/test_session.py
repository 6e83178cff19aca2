"""Sessions: rows come and go, the host looks rarely, a round is replayed, nothing leaks."""

from __future__ import annotations

import gc
import random
from copy import copy
from functools import cache

import pytest
import torch

from specdiff import AdaptiveK, Decoder, PagedRowCache, Sampling, Session, Target
from specdiff.drafters import Autoregressive, Drafter, PromptLookup
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.sedd import SEDD
from specdiff_kernels import DistributionError, Draft
from tests.replay import RecordedCapture
from tests.tiny import block_diffusion, eagle, parallel, tiny_model

SAMPLED = Sampling(temperature=0.9, top_p=0.95)


@cache
def denoiser() -> DDiT:
    torch.manual_seed(0)
    network = DDiT(DDiTConfig(50, hidden_size=16, blocks=2, heads=2, cond_dim=8, length=24))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network


DRAFTERS = {
    "none": lambda target: None,
    "prompt-lookup": lambda target: PromptLookup(),
    "autoregressive": lambda target: Autoregressive(tiny_model("gpt2", seed=5)),
    "block-diffusion": block_diffusion,
    "parallel": parallel,
    "eagle": eagle,
    "entangled": lambda target: SEDD(denoiser(), steps=3, hot_start="entangled"),
    "recycled": lambda target: SEDD(denoiser(), steps=3, hot_start="recycled"),
}
RESIDENT = ("none", "autoregressive", "block-diffusion", "parallel", "eagle")


def requests(count: int, longest: int = 12, new: int = 20, seed: int = 0):
    """(prompt, most new tokens) of ragged rows"""
    draw = random.Random(seed)
    return [
        ([draw.randrange(50) for _ in range(draw.randint(1, longest))], draw.randint(1, new))
        for _ in range(count)
    ]


def serve(session, jobs, watch=lambda: None) -> list[list[int]]:
    """All jobs, through as many places as the session has. -> new tokens of each"""
    waiting, held = list(enumerate(jobs)), {}
    texts: list[list[int]] = [[] for _ in jobs]
    while waiting or held:
        for place, free in enumerate(session.done):
            if free and place in held:
                texts[held.pop(place)] = session.texts[place][session.prompts[place] :]
            if free and waiting and session.has_room(len(waiting[0][1][0]) + waiting[0][1][1]):
                job, (prompt, new) = waiting.pop(0)
                session.admit([prompt], first=place, max_new_tokens=new, seed=job)
                held[place] = job
        session.step()
        watch()
    return texts


def alone(decoder, jobs, sampling) -> list[list[int]]:
    return [
        decoder.generate(prompt, max_new_tokens=new, seed=job, sampling=sampling).new_tokens[0]
        for job, (prompt, new) in enumerate(jobs)
    ]


@pytest.mark.parametrize("kind", [{}, {"block_size": 3}, {"look_every": 3, "block_size": 4}])
@pytest.mark.parametrize("name", DRAFTERS)
def test_rows_that_take_others_places_get_the_text_they_get_alone(target, name, kind):
    jobs = requests(8)
    decoder = Decoder(target, DRAFTERS[name](target), None if name == "none" else 4)
    session = decoder.open(3, 33, sampling=SAMPLED, **kind)
    # what a draft is conditioned on after a rejection depends on nothing else
    want = alone(Decoder(target, DRAFTERS[name](target), decoder.settings.k or None), jobs, SAMPLED)
    assert serve(session, jobs) == want
    assert session.stats.tokens == sum(map(len, want))


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_other_rules_too(target, rule):
    jobs = requests(8, seed=1)
    make = lambda: Decoder(target, Autoregressive(tiny_model("gpt2", seed=5)), 4, rule)
    assert serve(make().open(3, 33, sampling=SAMPLED), jobs) == alone(make(), jobs, SAMPLED)


def test_adaptive_lengths_are_forgotten_with_the_row(target):
    jobs = requests(8, seed=2)
    make = lambda: Decoder(target, Autoregressive(target.model), AdaptiveK(5))
    assert serve(make().open(2, 33, sampling=SAMPLED), jobs) == alone(make(), jobs, SAMPLED)


@pytest.mark.parametrize("name", ["none", "autoregressive", "prompt-lookup"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("look_every", [2, 7])
def test_looking_rarely_changes_nothing(target, name, sampling, look_every):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]
    decoder = Decoder(target, DRAFTERS[name](target), None if name == "none" else 4)
    options = dict(max_new_tokens=30, sampling=sampling, seed=3)
    want = decoder.generate(prompts, **options)
    stop = want.new_tokens[0][11]
    for more in ({}, {"stop_tokens": [stop]}):
        want = decoder.generate(prompts, **options, **more)
        got = decoder.generate(prompts, look_every=look_every, **options, **more)
        assert got.new_tokens == want.new_tokens
        for name in ("tokens", "accepted", "target_forwards", "row_forwards", "accepted_at"):
            assert getattr(got.stats, name) == getattr(want.stats, name)


# --- what would be a CUDA graph ---


def replaying(decoder: Decoder, *args, **options) -> Session:
    """A session whose rounds are recorded and replayed."""
    session = decoder.open(*args, look_every=2, capture=RecordedCapture(), **options)
    if isinstance(session.cache, PagedRowCache):
        session.cache.check = lambda: None  # on a CPU it looks in every round
    return session


@pytest.mark.parametrize("kind", [{}, {"block_size": 4}])
@pytest.mark.parametrize("name", RESIDENT)
def test_a_round_can_be_replayed(target, name, kind):
    """Rows come and go between replays; keys beyond 32 are another graph."""
    jobs = requests(9, longest=20, new=30, seed=3)
    make = lambda: Decoder(target, DRAFTERS[name](target), None if name == "none" else 4)
    session = replaying(make(), 3, 51, sampling=SAMPLED, **kind)
    assert serve(session, jobs) == alone(make(), jobs, SAMPLED)
    assert session._captured.replayed > 10 and 1 <= len(session._captured.graphs) <= 2


def test_rows_with_other_parameters_are_captured_anew(target):
    """A row that is the first to use top_k changes the tensors that a graph reads."""
    decoder = Decoder(target, Autoregressive(target.model), 3)
    session = replaying(decoder, 2, 51, sampling=SAMPLED, stop_tokens=[])
    session.admit([[1, 2, 3]], max_new_tokens=30, seed=5)
    for _ in range(3):
        session.step()
    assert session._captured.graphs
    own = Sampling(0.8, top_k=3)
    session.admit([[4, 5]], first=1, max_new_tokens=20, seed=6, sampling=own)
    assert not session._captured.graphs
    while not all(session.done):
        session.step()
    for b, (prompt, new, way) in enumerate((([1, 2, 3], 30, SAMPLED), ([4, 5], 20, own))):
        alone = decoder.generate(
            prompt, max_new_tokens=new, sampling=way, seed=[5 + b], stop_tokens=[]
        )
        assert session.texts[b] == alone.sequences[0]


def test_a_prompt_that_failed_can_be_admitted_again(target):
    """The drafter forgets what it had read of it."""
    network = parallel(target).network
    drafter = type(parallel(target))(network, target)
    decoder = Decoder(target, drafter, 2)
    prompt = [t % target.vocab_size for t in range(1, 31)]
    want = decoder.generate(prompt, max_new_tokens=8, stop_tokens=[]).stats
    session, read = decoder.open(1, 50, stop_tokens=[]), drafter.read

    def failing(rows, news):
        read(rows, news)
        raise MemoryError("for once")

    drafter.read = failing
    with pytest.raises(MemoryError):
        session.admit([prompt], max_new_tokens=8)
    del drafter.read
    session.admit([prompt], max_new_tokens=8)
    while not session.done[0]:
        session.step()
    assert session.stats.accepted_at == want.accepted_at


def test_a_place_is_used_again_by_a_prompt_of_one_token(target):
    """The target drafts for itself: every token is accepted, also in a batch of one."""
    session = Decoder(target, Autoregressive(target.model), 3).open(1, 50, stop_tokens=[])
    for prompt in ([1, 2, 3], [7]):
        session.admit([prompt], max_new_tokens=12)
        while not session.done[0]:
            session.step()
    assert session.stats.accepted == session.stats.drafted > 0


def test_looking_at_the_device_is_caught(target):
    class Looks(Autoregressive):
        def draft(self, news, k, lengths, draws):
            assert lengths.max() >= 0
            return super().draft(news, k, lengths, draws)

    session = replaying(Decoder(target, Looks(target.model), 4), 1, 51)
    session.admit([[1, 2, 3]], max_new_tokens=30)
    with pytest.raises(AssertionError, match="waits for the device"):
        session.step()


def test_replaying_what_keeps_new_memory_is_caught(target):
    """A drafter that counts in a new tensor: the text of the replay is another, or it fails."""

    class Rebinds(Autoregressive):
        def _read(self, news):
            self.cache.set_lengths(self.cache.lengths.clone(), self.cache.longest)
            return super()._read(news)

    make = lambda: Decoder(target, Rebinds(target.model), 4)
    jobs = requests(3, new=30, seed=3)
    session = replaying(make(), 3, 51)
    serve(session, jobs)
    assert (
        session.stats.acceptance[0]
        < 0.9
        < make().generate(jobs[0][0], max_new_tokens=30).stats.acceptance[0]
    )


def test_capture_needs_a_gpu(target):
    with pytest.raises(ValueError, match="capture needs a CUDA device, got a target on cpu"):
        Decoder(target).open(1, 10, capture=True, look_every=2)


def test_what_cannot_be_captured_is_refused(target):
    with pytest.raises(ValueError, match="capture needs a look_every above 1"):
        Decoder(target).open(1, 10, capture=RecordedCapture())
    with pytest.raises(ValueError, match="PromptLookup waits for the device"):
        replaying(Decoder(target, PromptLookup()), 1, 10)


# --- seeds ---


def test_prompts_admitted_one_by_one_get_seeds_of_their_own(target):
    decoder = Decoder(target, None)
    session = decoder.open(3, 40, sampling=Sampling(1.0), stop_tokens=())
    for place in range(3):
        session.admit([1, 2, 3], first=place, max_new_tokens=12)
    while not all(session.done):
        session.step()
    assert len({tuple(text) for text in session.texts}) == 3
    together = decoder.generate([[1, 2, 3]] * 3, max_new_tokens=12, sampling=Sampling(1.0),
                                stop_tokens=())  # fmt: skip
    assert session.texts == together.sequences


# --- a drafter is one session's ---


def test_a_drafter_in_use_says_so(target):
    drafter = Autoregressive(tiny_model("llama"))
    decoder = Decoder(target, drafter, 3)
    first, second = (decoder.open(1, 30) for _ in range(2))
    second.admit([[1, 2]], max_new_tokens=9)
    first.admit([[3, 4, 5]], max_new_tokens=9)
    with pytest.raises(ValueError, match="Autoregressive is in use by a session that began later"):
        first.step()
    while not all(second.done):
        second.step()
    want = Decoder(target).generate([1, 2], max_new_tokens=9).sequences
    assert second.texts == want
    own = Decoder(target, copy(drafter), 3).open(1, 30)  # the weights are shared, the state is not
    own.admit([[1, 2]], max_new_tokens=9)
    while not all(own.done):
        own.step()
    assert own.texts == want


def test_drafters_without_a_state_serve_several_sessions(target):
    class Zeros(Drafter):
        def draft(self, news, k, lengths, draws):
            tokens = lengths.new_zeros(len(lengths), k)
            return Draft(tokens, tokens.int(), tokens - 1, lengths=lengths)

    decoder = Decoder(target, Zeros(), 3)
    sessions = [decoder.open(1, 30) for _ in range(2)]
    for session in sessions:
        session.admit([[1, 2]], max_new_tokens=9)
    while not all(sessions[0].done):
        for session in sessions:
            session.step()
    assert sessions[0].texts == sessions[1].texts


# --- limits ---


def test_bad_places(target):
    decoder = Decoder(target, PromptLookup())
    session = decoder.open(2, 20)
    session.admit([[1, 2]], max_new_tokens=5)
    with pytest.raises(ValueError, match="place 0 is taken"):
        session.admit([[1]], max_new_tokens=5)
    with pytest.raises(ValueError, match="places 1 to 2 were asked for, but the session has 2"):
        session.admit([[1], [2]], first=1, max_new_tokens=5)
    with pytest.raises(ValueError, match="a row of up to 26 tokens does not fit"):
        session.admit([[1]], first=1, max_new_tokens=25)
    with pytest.raises(ValueError, match="look_every must be 1 with a stop string"):
        decoder.open(1, 20, look_every=2, ends=lambda row, tokens: False)


@pytest.mark.parametrize("look_every", [1, 4])
def test_a_sick_row_is_named_and_the_others_go_on_without_it(look_every):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[7] = float("nan")
    decoder = Decoder(Target(model))
    want = decoder.generate([1, 2], max_new_tokens=9).sequences[0]
    session = decoder.open(2, 20, look_every=look_every, block_size=4)
    session.admit([[1, 2], [7]], max_new_tokens=9)
    with pytest.raises(DistributionError, match=r"sequence 1 .*NaN"):
        session.step()
    assert session.texts == [want[: 2 + look_every], [7]]
    session.abort(1)
    assert session.done[1] and not (session.cache.pages.tables[1] >= 0).any()
    while not session.done[0]:
        session.step()
    assert session.texts[0] == want


@pytest.mark.parametrize("name", ["autoregressive", "parallel", "block-diffusion", "eagle"])
def test_a_row_without_a_draft_is_named_and_the_others_go_on(target, name):
    """The drafter has read what was committed, and is not told it again."""
    alone, drafter = DRAFTERS[name](target), DRAFTERS[name](target)
    want = Decoder(target, alone, 3).generate([1, 2], max_new_tokens=30, stop_tokens=())
    head = drafter.model.head if name == "autoregressive" else drafter.head
    calls = []

    def sick(module, given, logits):
        calls.append(1)
        if len(calls) == 4:
            logits[1] = float("nan")

    handle = head.register_forward_hook(sick)
    session = Decoder(target, drafter, 3).open(2, 40, stop_tokens=())
    session.admit([[1, 2], [7, 8]], max_new_tokens=30)
    with pytest.raises(DistributionError, match=r"the drafter's logits: sequence 1 .*NaN"):
        while not all(session.done):
            session.step()
    session.abort(1)
    handle.remove()
    while not session.done[0]:
        session.step()
    assert session.texts[0] == want.sequences[0]
    assert drafter.cache.lengths[0] == alone.cache.lengths[0]


def test_what_ends_a_row_is_not_asked_about_what_was_cut_off(target):
    text = Decoder(target).generate([1, 2, 3], max_new_tokens=20).new_tokens[0]
    asked = []
    ends = lambda row, tokens: asked.append(list(tokens))
    decoder = Decoder(target, Autoregressive(target.model), 4)
    session = decoder.open(1, 20, ends=ends, stop_tokens=text[5:6])
    session.admit([[1, 2, 3]], max_new_tokens=7)
    while not session.done[0]:
        session.step()
    assert [*asked[-1], text[5]] == session.texts[0][3:] == text[: text.index(text[5]) + 1]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("block_size", [None, 4, 256])
@pytest.mark.parametrize("name", ["flash", "flex"])
@pytest.mark.usefixtures("flash_attn")
def test_every_attention_serves_a_session(name, block_size):
    """flash-attn, which needs a GPU, by what it documents; it reads blocks of 256 in place."""
    other, plain = Target(tiny_model("llama"), attention=name), Target(tiny_model("llama"))
    jobs = requests(6, seed=4)
    session = Decoder(other, PromptLookup(), 4).open(2, 33, block_size=block_size)
    assert session.cache.window.gathers == (name == "flex" or block_size != 256)
    assert serve(session, jobs) == alone(Decoder(plain, PromptLookup(), 4), jobs, Sampling())


def test_room_counts_what_running_rows_may_still_take(target):
    session = Decoder(target).open(3, 41, block_size=4, blocks=20)
    session.admit([[1]], max_new_tokens=40)  # 40 positions: 10 blocks
    assert session.has_room(41) and not session.has_room(42)
    session.admit([[1]], first=1, max_new_tokens=24)  # 6 blocks
    assert session.has_room(17) and not session.has_room(18)
    with pytest.raises(ValueError, match="the pool has too few blocks"):
        session.admit([[1]], first=2, max_new_tokens=17)
    while not session.done[1]:
        session.step()
    assert session.has_room(41)


# --- for long ---


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rounds_leave_no_tensors_behind():
    target, drafter = (tiny_model("llama", context=256, seed=seed) for seed in (0, 5))
    session = Decoder(Target(target), Autoregressive(drafter), 1).open(1, 250, block_size=4)
    session.admit([[1, 2, 3]], max_new_tokens=240)
    counts = []
    for rounds in (5, 100):
        for _ in range(rounds):
            session.step()
        counts.append(live_tensors())
    assert not session.done[0] and counts[0] == counts[1]


def predicted(model, text: list[int], new: int) -> list[int]:
    """The model's greedy tokens at the last `new` positions of a text, read at once and alone."""
    with torch.inference_mode():
        return model(torch.tensor([text])).logits[0, -new - 1 : -1].argmax(-1).tolist()


@pytest.mark.slow
def test_two_thousand_rounds_of_64_places_leak_nothing():
    """Prompts of 1 to 40 tokens are admitted wherever a row has finished; each text is that of its
    row alone, and all blocks come back."""
    model = tiny_model("llama", context=256)
    decoder = Decoder(Target(model), PromptLookup(), 4)
    session = decoder.open(64, 200, block_size=16, blocks=500)
    pages = session.cache.pages
    draw = random.Random(0)
    held = lambda: int((pages.tables >= 0).sum())
    finished, sample = [], []
    for round in range(2000):
        for place, free in enumerate(session.done):
            if not free:
                continue
            if session.prompts[place]:
                finished.append((list(session.texts[place]), session.prompts[place]))
            prompt = [draw.randrange(50) for _ in range(draw.randint(1, 40))]
            new = draw.randint(1, 150)
            if session.has_room(len(prompt) + new):
                session.admit([prompt], first=place, max_new_tokens=new)
            else:
                session.prompts[place] = 0
        session.step()
        if round % 100 == 0:
            assert int(pages.available) + held() == 500 and int(pages.references.sum()) == held()
            sample += finished[-1:]
    while not all(session.done):
        session.step()
    assert int(pages.available) == 500 and held() == 0 and not pages.references.any()
    assert sorted(pages.free.tolist()) == list(range(500))
    assert len(finished) > 500
    for text, prompt in finished:
        assert text[prompt:] == predicted(model, text, len(text) - prompt)
    for text, prompt in sample:
        new = len(text) - prompt
        assert decoder.generate(text[:prompt], max_new_tokens=new).sequences == [text]
