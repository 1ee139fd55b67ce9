"""The mutants of `tutelage.core`, in the form of `mutant_list`."""

from __future__ import annotations

Group = tuple[list[str], list[tuple[str, str]]]

CORE_MUTANTS: dict[str, Group] = {
    "core/_block.py": (
        ["core/test_stats.py", "core/test_objective.py"],
        [
            ("log_z = torch.log1p(others / largest)", "log_z = torch.log1p(others)"),
            ("entropy = log_z - _dot(", "entropy = log_z + _dot("),
            ("forward_kl = offset - _dot(", "forward_kl = -offset - _dot("),
            ("        mean_gap - offset,\n", "        mean_gap,\n"),
            ("        gap.masked_fill_(p == 0, 0.0)", "        pass"),
            ("gap.masked_fill(q == 0, 0.0) if has_inf else gap", "gap"),
            ("logits.masked_fill(p == 0, 0.0) if has_inf else logits", "logits"),
            ("return top, start + place", "return top, place"),
            (
                "stop = min(start + rows, n)\n        merged",
                "stop = min(start + rows, n - 1) or 1\n        merged",
            ),
        ],
    ),
    "core/objective.py": (
        ["core/test_objective.py", "core/test_objective_edges.py", "core/test_terms.py"],
        [
            (
                "weighted(a, block.reverse_kl) + weighted(b, block.forward_kl)",
                "weighted(a, block.reverse_kl) - weighted(b, block.forward_kl)",
            ),
            (
                "block.gap.sub_(block.mean_gap).mul_(a[:, None])",
                "block.gap.mul_(a[:, None])",
            ),
            ("gradient.sub_(block.q.mul_(b[:, None]))", "gradient.sub_(block.q)"),
            ("        if torch.is_grad_enabled():  # create", "        if False:  # create"),
            ("b = b * self.gate(block.teacher_entropy)", "b = b * self.gate(block.entropy)"),
        ],
    ),
    "core/_sums.py": (
        ["core/test_objective.py", "core/test_objective_edges.py", "core/test_terms.py"],
        [
            ("return weight * value.masked_fill(weight == 0, 0.0)", "return weight * value"),
        ],
    ),
    "core/_gradients.py": (
        ["core/test_objective.py", "core/test_objective_edges.py", "core/test_terms.py"],
        [
            (".square_().neg_().add_(1.0)", ".square_().neg_().add_(1.01)"),
            ("            z.mul_(student.scale)\n", "            pass\n"),
            ("        self.is_spent = True\n", "        self.is_spent = False\n"),
            ("self.bias.add_(z.sum(0))", "self.bias.add_(z.mean(0))"),
            ("None if g is None else g.mul_(factor) for g", "None if g is None else g for g"),
        ],
    ),
    "core/kernels/passes.py": (
        ["core/test_kernels.py", "core/test_kernel_launches.py"],
        [
            ("self._spare + 2 * first", "self._spare + 3 * first"),
        ],
    ),
    "core/kernels/products.py": (
        ["core/test_kernels.py", "core/test_kernel_launches.py"],
        [("out[:, first] = out[:, second]", "pass")],
    ),
    "core/kernels/total.py": (
        ["core/test_kernels.py", "core/test_kernel_launches.py"],
        [
            ("log_ratio - kl[:, None]", "log_ratio"),
            ("spread = (-weight, shift.float())", "spread = (weight, shift.float())"),
            ("added = -slope[:, None]", "added = slope[:, None]"),
        ],
    ),
    "core/kernels/rows.py": (
        ["core/test_kernels.py", "core/test_kernel_launches.py"],
        [
            ("ratio * (energy + shift * (rest + ties))", "ratio * energy"),
            ("tl.where(fell, ties, 0.0)", "0.0"),
            ("s_ratio * (s_gap + moved * s_z)", "s_ratio * s_gap"),
            ("tl.where(fell, 0.0, ties), rest", "ties, rest"),
            ("1.0 - ratio * ratio", "1.0"),
        ],
    ),
    "core/products.py": (
        ["models/test_cpu_products.py"],
        [
            ("out[here].add_(fast(a[here], b))", "out[here] = fast(a[here], b)"),
            ("for low in range(0, len(b), _PIECE)", "for low in range(0, len(b) - 1, _PIECE)"),
            (" or out.dtype != a.dtype:", ":"),
            ("if out.shape != (len(a), len(b)) or ", "if "),
        ],
    ),
    "core/terms.py": (
        ["core/test_terms.py"],
        [
            (
                "value = (1 - w) * torch.linalg.vecdot(block.p, over_m)",
                "value = w * over_m.sum(-1)",
            ),
            (
                "torch.linalg.vecdot(block.q, over_m - log_ratio)",
                "torch.linalg.vecdot(block.q, over_m)",
            ),
            ("g = over_m - self.alpha * over_m.exp()", "g = over_m - over_m.exp()"),
            ("return self.q / self.q.sum(-1, keepdim=True)", "return self.q"),
            ("value + weighted_gap(top.log_q_rest, top.log_p_rest)", "value + 0"),
            ("gradient = block.p - top.rest_of_q_shaped_as_p()", "gradient = block.p - block.q"),
            ("return -torch.minimum(plain", "return -torch.maximum(plain"),
            ("is_active = plain <= clipped", "is_active = plain >= clipped"),
            (".exp(), log_q - old, bounds)", ".exp(), log_q - log_p, bounds)"),
            ("return factor * block.forward_kl, gradient", "return block.forward_kl, gradient"),
            (
                "ids = block.teacher_logits.topk(",
                "ids = block.q.topk(",
            ),
            (
                "top = Buckets.of(block, self.k, self.support)\n        tail",
                "top = Buckets.of(block, self.k)\n        tail",
            ),
            (
                "gradient: Tensor = p * (g - torch.linalg.vecdot(p, g)[:, None])",
                "gradient: Tensor = p * g",
            ),
        ],
    ),
    "core/policy.py": (
        ["core/test_policy.py"],
        [
            ("bounds = (1 - self.clip_low, 1", "bounds = (1 - self.clip_high, 1"),
            ("1 + self.clip_high)", "1 + self.clip_low)"),
            ("(groups.std(1, keepdim=True) + STD_OFFSET)", "groups.std(1, keepdim=True)"),
            ("groups.mean(1, keepdim=True)", "groups.mean()"),
            (
                ".masked_fill(is_uniform(rewards, num_samples)[:, None], 0.0).flatten()",
                ".flatten()",
            ),
            (
                "scatter_add_(-1, tokens, -slope[:, None])",
                "scatter_add_(-1, tokens, slope[:, None])",
            ),
            ("gradient = block.p * slope[:, None]", "gradient = torch.zeros_like(block.p)"),
            ("clipped_surrogate((log_p - old).exp()", "clipped_surrogate((old - log_p).exp()"),
            ("self.is_clipped[rows] = is_clipped", "pass"),
            ('object.__setattr__(other, "is_clipped", self.is_clipped)', "pass"),
            ("rows[2, here] = block.entropy", "rows[3, here] = block.entropy"),
            ("block.logits.copy_(gradient)", "pass"),
            (
                "(term(block, here), weights[here])",
                "(term(block, here), weights[: block.p.shape[0]])",
            ),
            ("rewards.double().view(-1, num_samples)", "rewards.double().view(num_samples, -1).T"),
            ("(groups == groups[:, :1]).all(1)", "(groups == groups[:, 1:2]).any(1)"),
        ],
    ),
    "core/rules.py": (
        ["core/test_rules.py", "core/test_selection.py"],
        [
            ("quantile(x, 0.98) if is_clipped", "quantile(x, 0.95) if is_clipped"),
            ('(method == "minmax_p98" and is_entropy)', 'method == "minmax_p98"'),
            ("return _scale(x, finite.min(),", "return _scale(x, x.min(),"),
            ("return h + d * (1 - h)", "return h + d"),
            (
                "return stats.forward_kl.double() * (1 - ",
                "return stats.reverse_kl.double() * (1 - ",
            ),
            ("return -(-uniform.log()).log()", "return (-uniform.log()).log()"),
            ("lambda stats, context: -soft_or(", "lambda stats, context: soft_or("),
            ("-context.position.double()", "context.position.double()"),
            ("-stats.log_p.double()", "stats.log_p.double()"),
            ("abs() ** (1 - b) * gap**b", "abs() ** b * gap ** (1 - b)"),
            ("-torch.minimum(*ranks)", "-torch.maximum(*ranks)"),
            ("either = r + u * (1 - r)", "either = r + u"),
            ("torch.where(either == 1, r + u, either)", "either"),
            ("| (place[1:] != place[:-1])", ""),
        ],
    ),
    "core/selection.py": (
        ["core/test_selection.py", "core/test_sampling_correction.py", "core/test_rules.py"],
        [
            ("    is_usable &= stats.is_finite()\n", ""),
            ("is_usable = is_usable & ~is_stop", "pass"),
            ("max(1, math.floor(share * m))", "math.floor(share * m)"),
            ("max(1, math.floor(share * m))", "max(1, math.ceil(share * m))"),
            ("share = Fraction(str(keep))", "share = Fraction(keep)"),
            (
                "order = ranked.argsort(descending=True, stable=True)",
                "order = len(ranked) - 1 - ranked.flip(0).argsort(descending=True, stable=True)",
            ),
            ("1 / -torch.expm1(-excess.exp())", "1 / excess.exp()"),
            ("has_next = self.budget < self.size", "has_next = self.budget <= self.size"),
            ("(2 * place + (~is_usable).long())[order]", "(2 * place)[order]"),
            (
                'group = completion if scope == "completion"',
                'group = completion if scope == "batch"',
            ),
        ],
    ),
    "core/weighting.py": (
        ["core/test_weighting.py"],
        [
            ("return (teacher_entropy >= threshold)", "return (teacher_entropy > threshold)"),
            ("(teacher_entropy - threshold) / width", "(threshold - teacher_entropy) / width"),
            ("raw = (1 - _share_of_largest(teacher_h))", "raw = _share_of_largest(teacher_h)"),
            ("return (rate * (1 - rate))", "return rate"),
            (
                "torch.softmax(reward.double() / beta, 0) * len(reward)",
                "torch.softmax(reward.double(), 0)",
            ),
            ("masked_fill(is_in, 1.0)", "masked_fill(~is_in, 1.0)"),
            ("is_outside = uniform.log() >=", "is_outside = uniform.log() <="),
            (
                'stats.extras["entropy_direction"].sign() < 0',
                'stats.extras["entropy_direction"] > 0',
            ),
        ],
    ),
    "core/extras.py": (
        ["core/test_extras.py"],
        [
            (
                "quadratic = norm.square() / (2 * curvature)",
                "quadratic = norm.square() / curvature",
            ),
            ("torch.minimum(quadratic, block.forward_kl.double())", "quadratic"),
            ("energy = -(weighted + own_p * own_z)", "energy = -weighted"),
            ("is_head = q.cumsum(-1) - q < HEAD_MASS", "is_head = q.cumsum(-1) < HEAD_MASS"),
            (
                "return block.q.gather(-1, _top(block.p))",
                "return block.p.gather(-1, _top(block.p))",
            ),
            ("(block.gap - block.mean_gap)).square()", "block.gap).square()"),
            ("torch.where(is_major, own, 1 - 2 * p +", "torch.where(is_major, own, 1 - p +"),
            ("(weight * (r - b).square())", "(weight * r.square())"),
            ("r = r - r.masked_fill(~is_major, 0.0).sum(-1, keepdim=True)", "pass"),
        ],
    ),
    "core/lazy.py": (
        ["core/test_lazy.py", "core/test_objective.py"],
        [
            ("            out.add_(self.bias)\n", "            pass\n"),
            ("self.weight[:vocab_size]", "self.weight[-vocab_size:]"),
            ("out.div_(self.softcap).tanh_()", "out.tanh_()"),
        ],
    ),
    "core/divergence.py": (
        ["core/test_divergence.py"],
        [
            ("return _kl(log_p, log_q)\n", "return _kl(log_q, log_p)\n"),
            ("is_zero = log_a == -torch.inf", "is_zero = log_a != log_a"),
            ("+ math.log(teacher_weight)", "+ math.log1p(-teacher_weight)"),
        ],
    ),
    "core/counter.py": (
        ["core/test_counter.py"],
        [
            ("x = (x ^ _shift_right(x, 30))", "x = (x ^ _shift_right(x, 31))"),
            ("double() + 0.5) * 0.5**52", "double()) * 0.5**52"),
            ("return (x >> bits) & ((1 << (64 - bits)) - 1)", "return x >> bits"),
        ],
    ),
    "core/quadrants.py": (
        ["core/test_selection.py"],
        [
            ("entropy > limits[0]", "entropy >= limits[0]"),
            (
                "return 4 - 2 * is_uncertain.long() - is_wrong.long()",
                "return 4 - is_uncertain.long() - 2 * is_wrong.long()",
            ),
        ],
    ),
    "core/kernels/late.py": (
        ["core/test_kernels.py", "core/test_kernel_launches.py"],
        [
            ("self.slopes.times(factor)", "self.slopes"),
            ("!= self.versions:", "!= self.versions and False:"),
        ],
    ),
}
