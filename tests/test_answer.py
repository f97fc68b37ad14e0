import pandas as pd
import pytest
import torch
from conftest import FAMILIES, VOCAB, close, tiny, tiny_prompts

from dlk_utils.answer import MIN_SHARED, answer_prompts, plan_shared, sequence_logprobs, shared_logits
from dlk_utils.choices import choice_logprobs
from dlk_utils.extract import last_logits, pad, read_rows


def with_prefix(n: int = 7, length: int = 20) -> pd.DataFrame:
    start = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(9)).tolist()
    return tiny_prompts(n).assign(input_ids=lambda t: [start + list(i) for i in t.input_ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_answer(family):
    model, rows = tiny(family), with_prefix()
    together = shared_logits(model, list(rows.input_ids))
    for i, ids in enumerate(rows.input_ids):
        torch.testing.assert_close(together[i], last_logits(model, pad([ids]))[0], **close(model))


def test_the_shared_beginning_is_run_once(monkeypatch):
    model, rows, seen = tiny("llama"), with_prefix(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(k["input_ids"].numel()) or forward(*a, **k))
    shared_logits(model, list(rows.input_ids))
    assert len(seen) == 2 and sum(seen) < rows.input_ids.map(len).sum()


def test_one_prompt_that_begins_another_is_answered_too():
    model, rows = tiny("llama"), with_prefix(2)
    ids = [rows.input_ids[0], rows.input_ids[0] + [5]]
    torch.testing.assert_close(shared_logits(model, ids)[0], last_logits(model, pad(ids[:1]))[0], **close(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "gpt_neox"])
def test_the_log_probability_of_a_sequence_is_the_sum_over_its_tokens(family):
    model, prompt, sequences = tiny(family), [3, 8, 4, 6], [[5], [7, 9], [7, 2, 11]]
    found = sequence_logprobs(model, prompt, sequences)
    for s, logp in zip(sequences, found, strict=True):
        logits = model(torch.tensor([prompt + s])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(s))
        assert float(logp) == pytest.approx(float(expected), rel=1e-5)


def test_choices_that_share_a_token_are_told_apart_by_the_rest(tmp_path):
    model, rows = tiny("llama"), with_prefix(4)
    whole = [[[7, 9], [7, 2]] if i == 0 else None for i in range(4)]
    rows = rows.assign(strict_ids=rows.choice_ids, choice_tokens=[[[list(s)] for s in w] if w else None for w in whole])
    answer_prompts(model, rows, tmp_path / "a", record={})
    logp = read_rows(tmp_path / "a", rows, "choice_logprobs")
    expected = [float(x) for x in sequence_logprobs(model, rows.input_ids[0], whole[0])]
    assert list(logp[0]) == pytest.approx(expected, rel=1e-5) and logp[0][0] != logp[0][1]
    plain = choice_logprobs(last_logits(model, pad(rows.input_ids)), list(rows.choice_ids)).numpy()
    assert logp[1:] == pytest.approx(plain[1:], rel=1e-6)


def test_the_plan_has_each_row_once_and_groups_equal_beginnings():
    a, b = with_prefix(30), with_prefix(30, 24)
    rows = pd.concat([a, b.assign(row_id=b.row_id + "b")], ignore_index=True)
    plan = plan_shared(rows.sample(frac=1, random_state=1), 200)
    assert plan == plan_shared(rows, 200)
    batches = [batch for shard in plan for batch in shard]
    assert sorted(r for batch in batches for r in batch) == sorted(rows.row_id)
    by_id = rows.set_index("row_id").input_ids
    for batch in batches:
        ids = [by_id[r] for r in batch]
        assert all(i[:MIN_SHARED] == ids[0][:MIN_SHARED] for i in ids)
        assert len(ids) * max(map(len, ids)) <= 200 or len(ids) == 1
