"""The mutants of teachers that are no model of their own, in the form of `mutant_list`."""

from __future__ import annotations

Group = tuple[list[str], list[tuple[str, str]]]

TEACHER_MUTANTS: dict[str, Group] = {
    "models/self_teacher.py": (
        ["train/test_self_teacher.py"],
        [
            ("weight.data = value\n            yield", "pass\n            yield"),
            ("zip(self._pairs, own, strict=True):", "zip(self._pairs, ()):"),
            ("torch.zeros_like(weights[name])", "weights[name].detach().clone()"),
            ("name: value.clone() for name", "name: value for name"),
            ("weight, bias = weight.clone(), None", "weight, bias = weight, None"),
        ],
    ),
    "models/privileged.py": (
        ["train/test_self_teacher.py"],
        [
            (
                "        require_same_rows(batch, read, has_same_ids=",
                "        dict(batch=batch, read=read, has_same_ids=",
            ),
        ],
    ),
    "data/privileged.py": (
        ["data/test_privileged.py"],
        [
            ("_BETWEEN + context", "context"),
            ("content=context + prompt.content", "content=prompt.content + context"),
            ("for m in reversed(messages)", "for m in messages"),
        ],
    ),
    "train/teacher_prefix.py": (
        ["train/test_teacher_prefix.py"],
        [
            ("seed=(*request.seed, _PREFIX_SEED)", "seed=request.seed"),
            ("i not in stops and i < num_ids", "i not in stops"),
            ("i not in stops and i < num_ids", "i < num_ids"),
            ("max_new_tokens=sampling.max_new_tokens - length", "max_new_tokens=length"),
            ("first[place] + prefix.sample", "first[place]"),
            ("(False,) * len(prefix.completion_ids)", "(True,) * len(prefix.completion_ids)"),
            ("prefix.prompt_ids + prefix.completion_ids for", "prefix.prompt_ids for"),
            ("if not length:", "if True:"),
        ],
    ),
    "config/rollouts.py": (
        ["train/test_teacher_prefix.py"],
        [
            ("steps - (step - 1)", "steps - step"),
            (
                "-(-self.teacher_prefix_tokens * left // max(steps, 1))",
                "self.teacher_prefix_tokens * left // max(steps, 1)",
            ),
        ],
    ),
    "teachers/logprob_api.py": (
        ["teachers/test_logprob_api.py", "teachers/test_logprob.py"],
        [
            ("if top or log_q is not None:", "if log_q is not None:"),
            ("if top or log_q is not None:", "if top:"),
            ("min(log_q, *known.values()) <= _UNKNOWN", "min(known.values()) <= _UNKNOWN"),
            ('if text != f"token_id:{token}" and', "if text is None and"),
            ("len(numbers) < len(known) or min(numbers) < 0", "min(numbers) < 0"),
            ("len(numbers) < len(known) or min(numbers) < 0", "len(numbers) < len(known)"),
            ("if self._count[name] == 1:", "if self._count[name]:"),
            ('"logprob_start_len": 0,', '"logprob_start_len": -1,'),
        ],
    ),
    "teachers/logprob.py": (
        ["teachers/test_logprob_api.py", "teachers/test_logprob.py"],
        [
            (
                '> ROUNDING:\n            raise BadReply("a token with two',
                '> 9:\n            raise BadReply("a token with two',
            ),
            ("if mass > 1 + ROUNDING:", "if mass > 9:"),
            ("if token_log_q > least:", "if token_log_q > 9:"),
            ("k + (token in numbers):", "k + 1:"),
        ],
    ),
}
