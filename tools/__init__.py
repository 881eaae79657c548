"""What run.py is made of (standard library only): the environment, the real ComfyUI server, the demo."""
