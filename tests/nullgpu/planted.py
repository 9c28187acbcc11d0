"""Mistakes that the suite must tell: each text stands once in the script, which the default tests check."""

PLANTED = {  # what to replace in the script, by what, and what the suite must say of it
    "a bool index": ("self.looped_order if looped else self.order", "[self.order, self.looped_order][looped]", "indices must be integers or slices, not"),
    "a value read in the step": ("loss += micro_loss.detach()", "loss += micro_loss.item()", "rank 0: step 1: 2 waits"),
    "an upload in the step": ("loss = torch.zeros((), device=self.ranks.device)", "loss = torch.tensor(0.0).to(self.ranks.device, non_blocking=True)",
                              "rank 0: step 1: 1 pageable"),
    "a recompilation": ("self.compiled(ids, targets, self.looped)", "self.compiled(ids, targets, self.looped, 1.0 + (self.batches.step > 4))",
                        "rank 0: step 4: 2 compiles"),
    "fp32 times bf16": ("ready([b.mlp.fc.weight for b in blocks])", "torch.cat([b.mlp.fc.weight for b in blocks])", "same dtype"),
    "a host index in a batch": ("losses = forward(inputs, targets)\n", "losses = forward(inputs, targets)[torch.arange(len(inputs))]\n",
                                "1 waits"),
}
