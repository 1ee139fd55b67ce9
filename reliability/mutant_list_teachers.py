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
}
