"""Mistakes that the suite must detect. The default tests check that each text stands once in the script."""

PLANTED = {  # text of the script, its replacement, and words of the complaint
    "a bool index": (
        "self.looped_order if looped else self.order",
        "[self.order, self.looped_order][looped]",
        "indices must be integers or slices, not",
    ),
    "a value read in the step": ("loss += micro_loss.detach()", "loss += micro_loss.item()", "rank 0: step 1: 2 waits"),
    "an upload in the step": (
        "loss = torch.zeros((), device=self.ranks.device)",
        "loss = torch.tensor(0.0).to(self.ranks.device, non_blocking=True)",
        "rank 0: step 1: 1 pageable",
    ),
    "a recompilation": (
        "self.compiled(ids, targets, self.looped)",
        "self.compiled(ids, targets, self.looped, 1.0 + (self.batches.step > 4))",
        "rank 0: step 4: 2 compiles",
    ),
    "fp32 times bf16": ("return F.linear(x, weight.type_as(x))", "return F.linear(x, weight)", "same dtype"),
    "a host index in a batch": (
        "losses = [forward(*rows) for forward, _ in experts]",
        "losses = [forward(*rows)[torch.arange(len(spans))] for forward, _ in experts]",
        "1 waits",
    ),
}
