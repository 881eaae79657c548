"""Low-bit weights: which layers may lose bits and why (``policy``), what the formats look like in a file (``formats``), strict
checks of such files (``files``), the error that they cost (``report``), and how large the inputs of layers get (``calibrate``).

The formats are ComfyUI's own, so that its layers do the arithmetic. Not covered: packing the numbers (ComfyUI's library does
that, see ``nodes/lowbit.py``).
"""
