"""A wheel for another torch, whose library cannot be loaded."""

raise OSError("flash_attn_3/_C.abi3.so: undefined symbol: aoti_torch_create_device_guard")
