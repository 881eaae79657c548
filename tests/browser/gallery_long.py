"""The workflows of long video, in the parts of ``gallery.py``."""

from __future__ import annotations

from gallery import GEMMA, HUB, WAN_VAE, Column, Item, file_list, loader, note, prompt

LONGSANA = ("SANA_Video_2B_480p_LongLive.pth", "diffusion_models",
            f"{HUB}/Efficient-Large-Model/SANA-Video_2B_480p_LongLive/resolve/main/checkpoints/SANA_Video_2B_480p_LongLive.pth")
FILES_LONG = (LONGSANA, GEMMA, WAN_VAE)
EMBEDDED_LONG = "embedded mini long"
FILES_NOTE = f"""**Three files**, then press **R** so that the lists are read again:
{file_list(FILES_LONG)}"""


def longsana() -> Item:
    return loader(LONGSANA[0], FILES_LONG, "long")


def scene(text: str, motion: int, key: str = "text", title: str | None = None, height: int = 300) -> Item:
    """A prompt without a negative one: LongSANA runs at CFG 1."""
    return prompt(text, motion, "", height, key, title)


def sampler(blocks: int, seed: int = 1, size: tuple[int, int] = (0, 0), state: tuple[str, str] | None = None, film: str = "",
            text: str = "text", key: str = "sample", title: str | None = None, window: int = 0) -> Item:
    """A block sampler; with ``film``, the name of a run folder, it also decodes each block at once."""
    links = {"model": ("load", "model"), "positive": (text, "positive")}
    links |= {"state": state} if state else {}
    links |= {"vae": ("load", "vae")} if film else {}
    return Item(key, "SanaVideoBlockSampler", {
        "blocks": blocks, "width": size[0], "height": size[1], "seed": seed, "control_after_generate": "fixed",
        "run_folder": film, "window": window}, links, title, (400, 0))


def video(prefix: str, film: str | None = None, samples: tuple[str, str] | None = None, name: str = "") -> tuple[Item, ...]:
    """Decode and save: the run folder of the sampler ``film``, or the latent ``samples``."""
    source = {"run_folder": (film, "run_folder")} if film else {"samples": samples}
    return (Item(f"decode{name}", "SanaVideoDecode", {"fps": 16}, {**source, "vae": ("load", "vae")}, size=(400, 0)),
            Item(f"save{name}", "SaveVideo", {"filename_prefix": prefix, "format": "mp4", "codec": "h264"},
                 {"video": (f"decode{name}", "video")}, size=(400, 0)))


def save_state(name: str, state: tuple[str, str]) -> Item:
    return Item("keep", "SanaVideoStateSave", {"name": name}, {"state": state}, size=(400, 0))


def join(key: str, first: tuple[str, str], second: tuple[str, str]) -> Item:
    return Item(key, "LatentConcat", {"dim": "t"}, {"samples1": first, "samples2": second}, "One after the other", (400, 0))


def shown(key: str, source: tuple[str, str], title: str) -> Item:
    return Item(key, "PreviewAny", {}, {"source": source}, title, (440, 160))


MINI_NOTE = """
## Half a minute of video, no downloads

Press **Run**. The small model that comes with the pack makes 30 seconds in 12 blocks, on two CPU cores in about half a minute.

Every finished block is kept in **output/sana_video/mini_long_video**, and *film.mp4* there can be played while the next one is
made. Press **Cancel** and **Run** again: it goes on where it was.

**Change** the *prompt* or the *seed* (another video), or *blocks* (24 is a minute; the first 12 are kept). Another size needs
another *run_folder*. *window* stays: this model remembers two blocks.

It knows: red, yellow, green, blue, purple, white · circle, square, triangle, star · stays still, slides left and right,
bounces up and down, moves in a circle, spins, grows and shrinks · black, grey, navy background.
"""
MINUTE_NOTE = f"""
## A minute of video, 480p

{FILES_NOTE}

**Write** what the video shows and press **Run**: 24 blocks of 2.5 seconds. Memory does not grow with the length.

Finished blocks are kept in **output/sana_video/long_video_minute**; *film.mp4* there plays while the next block is made.
**Cancel** and **Run** again goes on where it was.

**Change** *blocks* for another length (finished blocks stay), *seed* or *prompt* for another video, *run_folder* to keep both.
"""
CHAIN_NOTE = f"""
## Three parts, wired by their state

{FILES_NOTE}

Each part is 5 seconds and goes on where the one before ends: *state* to *state*. **Run** makes all three and joins them.

**Change** the *seed* or the *prompt* of the third part and press **Run**: only that part is made again. Copy a part to go on
longer. *Save State* keeps the end; the workflow *continue_saved_state* goes on from it.
"""
SAVED_NOTE = f"""
## Go on from a saved state

{FILES_NOTE}

**1.** Save a state first: the workflow *long_video_chain* ends with *Save State*.

**2.** Choose it in *Load State* (press **R** if it is not listed), and write what happens next.

**3.** **Run**: 10 new seconds, which begin exactly where the state ends. The model and the size must be those of the state.

**Change** *run_folder* with every other state: a folder holds one film.
"""
FORK_NOTE = f"""
## One beginning, three endings

{FILES_NOTE}

The beginning is a film of 10 seconds. *Carry State* forks it: it hands the state after *block* 4 to three samplers, and keeps
the blocks up to there under a name of their own. Each ending begins exactly where the fork is.

**Change** the *prompt* or *seed* of an ending: only that ending is made again. A smaller *block* forks earlier. After a change of
the fork or the beginning give the endings other run folders: a folder holds one film.
"""
TRAVEL_NOTE = f"""
## Prompts over time

{FILES_NOTE}

One line a part: `[0-5s]` says when, then comes what is seen, then `; motion 5`. `motion 5 -> 12` glides, which is the motion
curve: 5 is calm, 30 lively. The last part `[15s-]` has no end.

**Change** the lines and press **Run**: blocks before the first changed line are kept. For more seconds raise *blocks* (one
is 2.5 seconds). `[block 3-4]` counts blocks instead of seconds.
"""
CLIP_NOTE = f"""
## Continue any clip

{FILES_NOTE}

**1.** Choose a clip in *Load Video*. Its last 81 frames are read, cut to 832 x 480; clips of 16 frames a second keep their speed.

**2.** Say what it shows (first prompt) and what happens next (second prompt).

**3.** **Run**: the model reads the clip into a state, goes on for 5 seconds, and both are decoded as one video.

Do not expect faces or small things to stay the same: the model was trained on text alone.
"""

DAWN = ("A red fox walks out of a snowy pine forest at dawn. Frost glitters on the branches, its breath steams in the cold "
        "air, and long blue shadows lie on the snow. The camera glides beside the fox at the height of its eyes. Realistic, "
        "soft morning light, fine detail in fur and snow.")
STREAM = ("A red fox reaches a frozen stream in a snowy pine forest and stops at its edge. It lowers its head and sniffs at "
          "the clear ice, under which bubbles drift. The camera stays low beside the fox. Realistic, soft morning light, fine "
          "detail.")
RUN = ("A red fox runs across a wide snowy meadow in bright morning sun. Snow flies up behind its paws and hangs glittering in "
       "the air. The camera follows fast at its side while the forest falls back. Realistic, golden light, fine detail.")
SNOWFALL = ("Thick snow begins to fall around a red fox in a pine forest. It sits down, curls its tail around its paws and "
            "looks up while large flakes settle on its fur. The camera slowly moves back. Realistic, grey soft light, calm.")
SLEEP = ("A red fox curls up under a snow-covered pine and closes its eyes. Its side rises and falls slowly, a single flake "
         "melts on its nose. The camera comes very slowly closer. Realistic, warm low light, fine detail, calm.")
TRAIN = ("Seen from the window of a slow train, a wide green valley passes by: meadows with grazing horses, a river that "
         "shines in the afternoon sun, small farms with red roofs, and far mountains under white clouds. Reflections of the "
         "carriage slide over the glass. The movement is steady and calm. Realistic, warm light, rich detail.")
SCHEDULE = """# [from-to] what is seen; motion score
[0-5s] A small wooden boat lies on a calm lake at dawn, mist drifts over the water. Realistic, soft light; motion 5 -> 12
[5-10s] A small wooden boat rocks on a lake as wind comes up, waves with white crests. Realistic, grey light; motion 12 -> 24
[10-15s] A small wooden boat in rain on a dark lake, drops strike the water, the wind dies down. Realistic; motion 24 -> 8
[15s-] A small wooden boat on a still lake at sunset after the rain, the sky shines orange in the water. Realistic; motion 8"""
HARBOUR = ("A quiet harbour in the early morning. Fishing boats rock gently at a stone pier, gulls circle above the masts, and "
           "the sun rises behind a lighthouse. Realistic, soft light.")
HARBOUR_NEXT = ("In the harbour a fishing boat casts off and glides past the lighthouse towards the open sea. Gulls follow it, "
                "its wake spreads over the smooth water, and the sun stands higher. Realistic, soft light.")


def mini_long_video() -> tuple[Column, ...]:
    text = "A red circle bounces up and down on a black background."
    return (Column("1 · Models", (note(MINI_NOTE, (380, 330)), loader(EMBEDDED_LONG))),
            Column("2 · Prompt", (scene(text, 10),)),
            Column("3 · Twelve blocks", (sampler(12, size=(160, 96), film="mini_long_video", window=2),)),
            Column("4 · Video", video("video/sana_video_mini_long", "sample")))


def long_video_minute() -> tuple[Column, ...]:
    return (Column("1 · Models", (note(MINUTE_NOTE, (380, 350)), longsana())),
            Column("2 · Prompt", (scene(TRAIN, 10),)),
            Column("3 · 24 blocks", (sampler(24, size=(832, 480), film="long_video_minute"),)),
            Column("4 · Video", video("video/sana_video_minute", "sample")))


def long_video_chain() -> tuple[Column, ...]:
    def part(number: int, text: str, motion: int) -> tuple[Item, Item]:
        before = (f"sample{number - 1}", "state") if number > 1 else None
        return (scene(text, motion, f"text{number}", f"Prompt {number}"),
                sampler(2, number, (832, 480) if number == 1 else (0, 0), before, text=f"text{number}", key=f"sample{number}",
                        title=f"Block Sampler {number}"))

    end = (join("join1", ("sample1", "latent"), ("sample2", "latent")), join("join2", ("join1", "LATENT"), ("sample3", "latent")),
           *video("video/sana_video_chain", samples=("join2", "LATENT")), save_state("long_video_chain", ("sample3", "state")))
    return (Column("1 · Models", (note(CHAIN_NOTE, (380, 320)), longsana())),
            Column("2 · First part", part(1, DAWN, 10)),
            Column("3 · Second part", part(2, STREAM, 8)),
            Column("4 · Third part", part(3, RUN, 25)),
            Column("5 · Join and save", end))


def continue_saved_state() -> tuple[Column, ...]:
    load = Item("state", "SanaVideoStateLoad", {"file": "long_video_chain_00001.safetensors"}, {"model": ("load", "model")},
                size=(440, 0))
    return (Column("1 · Models", (note(SAVED_NOTE, (380, 340)), longsana())),
            Column("2 · State and prompt", (load, shown("summary", ("state", "summary"), "What the state holds"),
                                            scene(SNOWFALL, 8))),
            Column("3 · New blocks", (sampler(4, 1, state=("state", "state"), film="continue_saved_state"),)),
            Column("4 · Video and state", (*video("video/sana_video_continued", "sample"),
                                           save_state("continued", ("sample", "state")))))


def fork_three_continuations() -> tuple[Column, ...]:
    def ending(letter: str, text: str, motion: int, seed: int) -> tuple[Item, ...]:
        return (scene(text, motion, f"text{letter}", f"Ending {letter}"),
                sampler(4, seed, state=("fork", "state"), film=f"fork_ending_{letter.lower()}", text=f"text{letter}",
                        key=f"sample{letter}", title=f"Block Sampler, ending {letter}"),
                *video(f"video/sana_video_ending_{letter.lower()}", f"sample{letter}", name=letter))

    fork = Item("fork", "SanaVideoKVStateCarry", {"action": "fork", "name": "fork_kept_beginning", "block": 4},
                {"run_folder": ("sample", "run_folder")}, size=(440, 0))
    beginning = (scene(DAWN, 10), sampler(4, size=(832, 480), film="fork_beginning"))
    endings = (ending("A", RUN, 25, 11), ending("B", SNOWFALL, 8, 12), ending("C", SLEEP, 5, 13))
    return (Column("1 · Models", (note(FORK_NOTE, (380, 340)), longsana())),
            Column("2 · The beginning", beginning),
            Column("3 · Fork", (fork, shown("summary", ("fork", "summary"), "What the state holds"),
                                *video("video/sana_video_beginning", "sample"))),
            *(Column(f"{number} · Ending {letter}", items) for number, letter, items in zip((4, 5, 6), "ABC", endings)))


def prompt_travel() -> tuple[Column, ...]:
    schedule = Item("schedule", "SanaVideoPromptSchedule", {"text": SCHEDULE, "motion_score": 10}, {"clip": ("load", "clip")},
                    size=(620, 420))
    return (Column("1 · Models", (note(TRAVEL_NOTE, (380, 340)), longsana())),
            Column("2 · Prompts over time", (schedule, shown("summary", ("schedule", "summary"), "The parts as understood"))),
            Column("3 · Eight blocks", (sampler(8, size=(832, 480), film="prompt_travel", text="schedule"),)),
            Column("4 · Video", video("video/sana_video_travel", "sample")))


def continue_any_clip() -> tuple[Column, ...]:
    clip = (
        Item("clip", "LoadVideo", {"file": "clip.mp4"}, size=(400, 300)),
        Item("frames", "GetVideoComponents", {}, {"video": ("clip", "VIDEO")}, size=(400, 0)),
        Item("last", "ImageFromBatch", {"batch_index": -81, "length": 81}, {"image": ("frames", "images")}, "The last 81 frames",
             (400, 0)),
        Item("scale", "ImageScale", {"upscale_method": "lanczos", "width": 832, "height": 480, "crop": "center"},
             {"image": ("last", "IMAGE")}, size=(400, 0)),
        Item("encode", "VAEEncode", {}, {"pixels": ("scale", "IMAGE"), "vae": ("load", "vae")}, size=(400, 0)))
    prefill = Item("prefill", "SanaVideoPrefillState", {}, {
        "model": ("load", "model"), "samples": ("encode", "LATENT"), "positive": ("text1", "positive")}, size=(440, 0))
    return (Column("1 · Models", (note(CLIP_NOTE, (380, 360)), longsana())),
            Column("2 · The clip", clip),
            Column("3 · What it shows", (scene(HARBOUR, 10, "text1", "What the clip shows"), prefill)),
            Column("4 · What happens next", (scene(HARBOUR_NEXT, 10, "text2", "What happens next"),
                                             sampler(2, 1, state=("prefill", "state"), text="text2"))),
            Column("5 · Join and save", (join("join", ("encode", "LATENT"), ("sample", "latent")),
                                         *video("video/sana_video_clip", samples=("join", "LATENT")))))


WORKFLOWS = {function.__name__: function for function in (
    mini_long_video, long_video_minute, long_video_chain, continue_saved_state, fork_three_continuations, prompt_travel,
    continue_any_clip)}
