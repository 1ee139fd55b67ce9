"""The mutants of what two models' ids have in common, in the form of `mutant_list`."""

from __future__ import annotations

Group = tuple[list[str], list[tuple[str, str]]]

VOCABULARY_MUTANTS: dict[str, Group] = {
    "core/id_class.py": (
        ["core/test_id_class.py"],
        [
            ("(own if bias is None else own + bias[ids]) * scale", "own * scale"),
            ("total.squeeze(-1) / scale", "total.squeeze(-1)"),
            (".exp().masked_fill(total == -torch.inf, 0.0)", ".exp()"),
            ("x[..., places] = x[..., sources]", "pass"),
            ("gradient[:, sources] = gradient[:, places]", "pass"),
            ("gradient[:, self.ids[0], None] * share", "gradient[:, self.ids[0], None]"),
            ("torch.where(tokens == source, place, found)", "found"),
            ("torch.where(tokens == v, self.ids[0], found)", "found"),
            ("moved[self.ids[0]] = 0.0", "pass"),
            ("self.vocab_size - len(self.ids) + 1", "self.vocab_size - len(self.ids)"),
        ],
    ),
    "core/shared_ids.py": (
        ["core/test_shared_ids.py"],
        [
            ("if ours in ends[0] or theirs in ends[1]:", "if ours in ends[0]:"),
            ("ends[1].add(theirs)", "pass"),
            ("if kept and min(others) == 0 < max(others):", "if False:"),
            ("is_other[list(self.stops[side])] = False", "pass"),
            ("logits[:, ids].logsumexp(-1, keepdim=True)", "logits[:, ids].amax(-1, keepdim=True)"),
            ("share = logits[:, ids].softmax(-1)", "share = torch.ones_like(logits[:, ids])"),
            ("len(self.pairs[0]) + bool(self.stops[0])", "len(self.pairs[0])"),
            ("self.num_columns - 1, dtype=torch.long)", "0, dtype=torch.long)"),
            ("table[list(self.stops[0])] = len(self.pairs[0])", "pass"),
            ("or bool(ends[0]) != bool(ends[1])", ""),
        ],
    ),
    "models/alignment.py": (
        ["models/test_alignment.py", "models/test_alignment_pieces.py", "train/test_aligned.py"],
        [
            ("table.setdefault((i in control, text), [])", "table.setdefault((False, text), [])"),
            ("            if i < size:\n", "            if True:\n"),
            ("(added[0] and not added[1], added[1] and not added[0])", "added"),
            ('" " + text if is_odd[1] and text else text', "text"),
            ("self._adds_space[side] and not end[-1:].isspace()", "self._adds_space[side]"),
            ("is_turn and align.begins_with_space(0", "align.begins_with_space(0"),
            ("is_turn and align.begins_with_space(1", "align.begins_with_space(1"),
            ('limit = _common(whole, b"".join(theirs))', "limit = len(whole)"),
            ("is_equal = limit == len(whole) == len(", "is_equal = limit == len("),
            ("is_equal and bool((ours and found) or not any(is_odd))", "is_equal"),
            ("stop <= limit and is_whole and place >= first", "stop <= limit and is_whole"),
            ("stop <= limit and is_whole", "stop <= limit"),
            ("found = [*found, min(self.stops[1])]", "found = [*found, ids[-1]]"),
            ("is_ended = bool(ids) and ids[-1] in self.stops[0]", "is_ended = False"),
            ("whole[: error.start].decode()", 'whole.decode(errors="replace")'),
            ("None if rollout.hidden is None else rollout.hidden[places]", "rollout.hidden"),
            (
                "tuple(rollout.logprobs[place] for place in places) if",
                "rollout.logprobs if",
            ),
        ],
    ),
    "models/token_bytes.py": (
        ["models/test_alignment.py", "models/test_alignment_pieces.py"],
        [
            ("return found | fallback", "return fallback | found"),
            ('text.replace(str(space), " ").encode()', "text.encode()"),
            ("_BYTE_TOKEN.fullmatch(text) if has_bytes else None", "None"),
            (
                "_BYTE_TOKEN.fullmatch(text) if has_bytes else",
                "_BYTE_TOKEN.fullmatch(text) if 1 else",
            ),
            ("(is_byte_level and i in added)", "i in added"),
            ("if i in control or (is_byte_level and i in added):", "if i in control:"),
            ("is_plain and len(spaces) == num_replaced == 1", "len(spaces) == num_replaced == 1"),
            ("len(spaces) == num_replaced == 1", "len(spaces) == 1"),
            ('part["prepend"] = ""', "pass"),
            ('part["prepend_scheme"] = "never"', "pass"),
            ('part["add_prefix_space"] = False', "pass"),
            ('core["truncation"] = core["padding"] = None', "pass"),
            ('bool(_adding(tokenizer) - {"ByteLevel"})', "bool(_adding(tokenizer))"),
        ],
    ),
    "core/partial.py": (
        ["core/test_partial.py"],
        [
            (
                "(self.ids != self.tokens[:, None]).all(1)",
                "(self.ids != self.tokens[:, None]).any(1)",
            ),
            ("- self.k - self.is_token_extra.long()", "- self.k"),
            (
                "return self.log_q.double().exp().sum(1) + extra",
                "return self.log_q.double().exp().sum(1)",
            ),
            (
                "log_mass = (1.0 - self.known_mass).clamp(min=TAIL_RESOLUTION).log()",
                "log_mass = (1.0 - self.known_mass).log()",
            ),
            ("return torch.minimum(log_mass, most)", "return log_mass"),
            (
                "each = here.log_tail - here.num_unknown.clamp(min=1).double().log()",
                "each = here.log_tail",
            ),
            ("known[:, None].to(out.dtype))\n", "known[:, None].to(out.dtype) * 0)\n"),
            ("counts[:, -1] = teacher.is_token_extra.double()", "pass"),
            ("least = log_p.scatter(1, ids, torch.inf).amin(1)", "least = rest.amax(1)"),
            (
                "low = torch.minimum((1.0 - q.sum(1) - tolerance)",
                "low = torch.minimum((1.0 - q.sum(1))",
            ),
            (
                "high = torch.minimum((1.0 - q.sum(1) + tolerance)",
                "high = torch.minimum((1.0 - q.sum(1))",
            ),
            ("most_mass = num * log_cap.exp()", "most_mass = num"),
            ("torch.where(num > 0, torch.inf, reverse)", "reverse"),
            (
                "torch.minimum(of_entropy(low, one), of_entropy(high, one))",
                "torch.maximum(of_entropy(low, one), of_entropy(high, one))",
            ),
            ("entropy + of_entropy(even, num)", "entropy + of_entropy(high, num)"),
            ("forward + of_forward(alike, log_rest, no_cap)", "forward"),
            (
                "torch.maximum(of_forward(low, least, log_cap), of_forward(high, least, log_cap))",
                "of_forward(low, least, log_cap)",
            ),
            ("reverse + torch.maximum(over_cap, over_tail)", "reverse"),
            (
                "over_tail = _product(log_rest.exp(), log_rest - high.log())",
                "over_tail = _product(log_rest.exp(), log_rest - low.log())",
            ),
            ("weight * torch.where(weight == 0, 0.0, x)", "weight * x"),
            (
                "return -low, -low + _product(tail, self.num_unknown.double().log())",
                "return -low, -low",
            ),
            ("known = known + _product(extra, self.token_log_q.double())", "known = known + 0.0"),
        ],
    ),
}
