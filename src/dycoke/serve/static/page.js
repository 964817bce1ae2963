"use strict";
const $ = (id) => document.getElementById(id);
const COLOURS = { active: "#f5a524", recalled: "#38a3f5", dark: "#15181d", hatch: "#4a515c" };
const SHADE = { kept: 0.42, gone: 0.86 };
const SIDE = 192; // longer side of a frame's canvas, in its own pixels
const REPLAY = 420; // milliseconds a word
const state = { config: null, clip: null, panes: [], focus: null, aborting: null };

// A browser says that the pointer moved where the page moved under it: an answer that grows would
// choose words by itself.
const pointer = { x: -1, y: -1, moved: false };

/* Sets of tokens: eight a byte, the first in the lowest bit. */
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const has = (bits, i) => (bits[i >> 3] >> (i & 7)) & 1;
const size = (bits) => { let n = 0; for (let b of bits) for (; b; b &= b - 1) n++; return n; };
const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(2)} s`);
const kib = (b) => (b < 1 << 20 ? `${Math.round(b / 1024)} KiB` : `${(b / (1 << 20)).toFixed(1)} MiB`);
const plain = (text) => text.replace(/^\s+/, "");

/* One answer: its words, and at each of them what became of every token of every frame. */
class Pane {
  constructor(asked) {
    const root = (this.root = $("pane").content.firstElementChild.cloneNode(true));
    this.asked = asked;
    this.steps = [];
    this.at = -1;
    this.follow = true;
    this.find = (selector) => root.querySelector(selector);
    this.words = this.find(".words");
    this.words.setAttribute("aria-label", `Answer, ${asked.title}`);
    this.words.innerHTML = '<span class="wait">reading the clip…</span>';
    this.slider = this.find("input");
    this.strip = this.find(".strip");
    this.find("h2").textContent = asked.title;
    this.find(".compare").hidden = true;
    this.find(".compare").onclick = () => compare(this);
    this.slider.oninput = () => this.choose(+this.slider.value);
    this.find(".play").onclick = () => this.play();
    root.addEventListener("pointerdown", () => (state.focus = this));
    root.addEventListener("focusin", () => (state.focus = this));
    this.words.onpointermove = (e) => pointer.moved && this.pointed(e.target);
    this.words.onclick = (e) => this.pointed(e.target);
    this.strip.onpointermove = this.strip.onpointerdown = (e) => {
      if (e.type === "pointermove" && !pointer.moved) return;
      const box = this.strip.getBoundingClientRect();
      const columns = Math.max(this.steps.length, 1);
      this.choose(Math.min(columns - 1, Math.max(0, Math.floor(((e.clientX - box.left) / box.width) * columns))));
    };
  }

  pointed(target) {
    const index = target.dataset.index;
    if (index === undefined || +index === this.at) return;
    this.pause();
    this.choose(+index);
  }

  async start(event) {
    this.places = []; // of the kept tokens, among all
    this.frames = []; // of all videos
    this.tokens = 0;
    for (const [v, video] of event.videos.entries()) {
      const keep = bytes(video.keep), encoded = video.encoded && bytes(video.encoded);
      for (let i = 0; i < video.tokens; i++) if (has(keep, i)) this.places.push(this.tokens + i);
      const perFrame = video.grid[0] * video.grid[1], scale = SIDE / Math.max(...video.size);
      const [height, width] = video.size.map((side) => Math.round(side * scale));
      video.times.forEach((time, f) => this.frames.push({
        time, grid: video.grid, width, height, encoded,
        from: f * perFrame, // among the video's tokens
        first: this.tokens + f * perFrame, // among all
        video: event.videos.length > 1 ? v + 1 : 0,
      }));
      this.tokens += video.tokens;
      if (encoded) $("skipped").hidden = false;
    }
    this.owner = new Int32Array(this.tokens); // the frame of each token
    this.frames.forEach((frame, f) => this.owner.fill(f, frame.first));
    this.figures = this.frames.map((frame) => this.figure(frame));
    this.find(".frames").replaceChildren(...this.figures.flatMap((figure, f) => {
      const { video, from } = this.frames[f];
      return video && !from ? [this.title(video), figure] : [figure];
    }));
    this.set("tokens", this.tokens);
    this.set("kept", this.places.length, this.tokens);
    const truth = this.find(".truth");
    truth.hidden = !event.truth;
    truth.textContent = `In the clip: ${event.truth}.`;
    this.pictures = await Promise.all(event.videos.flatMap((video) => video.frames).map(picture));
    this.draw();
  }

  title(video) {
    const title = document.createElement("h3");
    title.textContent = `Clip ${video}: ${this.asked.clip.files[video - 1].name}`;
    return title;
  }

  figure({ time, width, height }) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    canvas.setAttribute("role", "img");
    const caption = document.createElement("figcaption");
    caption.append(`${time.toFixed(1)} s`, document.createElement("i"));
    figure.append(canvas, caption);
    return figure;
  }

  word(event) {
    const step = {
      text: event.text,
      active: bytes(event.active),
      recalled: bytes(event.recalled),
      attention: event.attention === undefined ? null : bytes(event.attention),
      top: event.top || 0,
      share: event.share,
    };
    step.frames = new Float64Array(this.frames.length);
    if (step.attention)
      step.attention.forEach((a, v) => (step.frames[this.owner[this.places[v]]] += a * step.top / 255));
    if (!this.steps.length) this.words.replaceChildren();
    this.steps.push(step);
    const index = this.steps.length - 1;
    if (event.text) {
      if (/^\s/.test(event.text) && index) this.words.append(" ");
      this.mark(index, plain(event.text));
    }
    this.slider.max = index;
    if (this.follow) this.choose(index, true);
    else this.drawStrip();
  }

  mark(index, text) {
    const span = document.createElement("span");
    span.textContent = text;
    span.dataset.index = index;
    this.words.append(span);
    return span;
  }

  done(event) {
    const { report, timings } = event;
    const full = this.asked.method === "full";
    const held = full ? report.kv_bytes_full : report.kv_bytes;
    this.set("kv", kib(held), full ? 0 : kib(report.kv_bytes_full), full ? "" : "of");
    this.set("first", seconds(timings.ttft_s));
    this.set("per", seconds(timings.per_token_s));
    if (!this.steps.length) this.words.textContent = "(no answer)";
    else if (!this.steps.at(-1).text) this.mark(this.steps.length - 1, "").className = "end";
    this.find(".compare").hidden = full || state.panes.length > 1;
    this.finished = true;
    this.choose(Math.max(this.at, 0), true);
    this.root.dataset.done = "yes";
  }

  stopped(why) {
    if (!this.steps.length) this.words.innerHTML = `<span class="wait">${why}</span>`;
    else this.words.insertAdjacentHTML("beforeend", ` <span class="wait">${why}</span>`);
    this.root.dataset.done = "stopped";
  }

  set(name, value, of, word = "of") {
    const dd = this.find(`[data-n=${name}]`);
    dd.textContent = value;
    if (of) dd.insertAdjacentHTML("beforeend", ` <small>${word} ${of}</small>`);
  }

  choose(index, quiet = false) {
    if (!this.steps[index]) return;
    if (!quiet) {
      this.follow = index === this.steps.length - 1 && !this.finished;
      for (const other of state.panes) // side by side: the same word of both
        if (other !== this && other.finished) other.choose(Math.min(index, other.steps.length - 1), true);
    }
    this.at = index;
    this.slider.value = index;
    this.slider.style.setProperty("--done", this.steps.length > 1 ? index / (this.steps.length - 1) : 0);
    this.draw();
    if (!quiet) this.find(".said").textContent = this.describe();
  }

  describe() {
    const step = this.steps[this.at];
    const best = step.frames.indexOf(Math.max(...step.frames));
    const where = step.attention ? `, most at ${this.where(best)} seconds` : "";
    return `Word ${this.at + 1}, ${plain(step.text) || "end"}: attends to ${size(step.active)} tokens, ${size(step.recalled)} recalled${where}.`;
  }

  where(f) {
    const { time, video } = this.frames[f];
    return `${video ? `clip ${video}, ` : ""}${time.toFixed(1)}`;
  }

  play() {
    if (this.timer) return this.pause();
    let index = this.at >= this.steps.length - 1 ? 0 : this.at;
    this.find(".play").textContent = "❚❚";
    this.find(".play").setAttribute("aria-label", "Pause");
    this.choose(index);
    this.timer = setInterval(() => {
      if (++index >= this.steps.length) return this.pause();
      this.choose(index);
    }, REPLAY);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.find(".play").textContent = "▶";
    this.find(".play").setAttribute("aria-label", "Replay");
  }

  draw() {
    const step = this.steps[this.at];
    for (const span of this.words.children) span.classList.toggle("on", +span.dataset.index === this.at);
    if (step) {
      this.find("output").textContent = `word ${this.at + 1} of ${this.steps.length}`;
      this.slider.setAttribute("aria-valuetext", this.describe());
      this.set("active", size(step.active), this.tokens);
      this.set("recalled", size(step.recalled));
    }
    if (!this.pictures) return;
    const index = new Int32Array(this.tokens).fill(-1);
    this.places.forEach((place, v) => (index[place] = v));
    const most = step ? Math.max(...step.frames) : 0;
    this.figures.forEach((figure, f) => this.drawFrame(figure, f, step, index, most));
    this.drawStrip();
  }

  drawFrame(figure, f, step, index, most) {
    const [canvas, caption] = figure.children;
    const { width, height, grid: [rows, columns], encoded, from, first } = this.frames[f];
    const pen = canvas.getContext("2d");
    const counts = { kept: 0, active: 0, recalled: 0 };
    const everything = step && size(step.active) === this.places.length;
    pen.imageSmoothingEnabled = this.pictures[f].width >= width;
    pen.globalAlpha = 1;
    pen.drawImage(this.pictures[f], 0, 0, width, height);
    for (let j = 0; j < rows * columns; j++) {
      const x = Math.round((j % columns) * width / columns), y = Math.round(Math.floor(j / columns) * height / rows);
      const w = Math.round((j % columns + 1) * width / columns) - x, h = Math.round((Math.floor(j / columns) + 1) * height / rows) - y;
      const v = index[first + j];
      if (v < 0) {
        const skipped = encoded && !has(encoded, from + j);
        this.shade(pen, x, y, w, h, SHADE.gone);
        if (skipped) hatch(pen, x, y, w, h);
        continue;
      }
      counts.kept++;
      if (!step || !has(step.active, v)) {
        this.shade(pen, x, y, w, h, SHADE.kept);
        continue;
      }
      counts.active++;
      const recalled = has(step.recalled, v);
      counts.recalled += recalled;
      const heat = step.attention ? step.attention[v] / 255 : 0;
      pen.globalAlpha = 0.55 * Math.sqrt(heat);
      pen.fillStyle = recalled ? COLOURS.recalled : COLOURS.active;
      pen.fillRect(x, y, w, h);
      pen.globalAlpha = 1;
      if (everything) continue; // a frame around every token would say nothing
      const line = Math.max(2, Math.round(Math.min(w, h) / 9));
      pen.strokeStyle = recalled ? COLOURS.recalled : COLOURS.active;
      pen.lineWidth = line;
      pen.strokeRect(x + line / 2 + 1, y + line / 2 + 1, w - line - 2, h - line - 2);
    }
    const share = step && most ? step.frames[f] / most : 0;
    caption.lastChild.style.setProperty("--share", share.toFixed(3));
    figure.classList.toggle("top", share === 1);
    canvas.setAttribute("aria-label", `Frame at ${this.where(f)} seconds: ${counts.kept} tokens kept, ${counts.active} attended, ${counts.recalled} recalled`);
  }

  shade(pen, x, y, w, h, alpha) {
    pen.globalAlpha = alpha;
    pen.fillStyle = COLOURS.dark;
    pen.fillRect(x, y, w, h);
    pen.globalAlpha = 1;
  }

  /* A column per word, a row per frame: where in the clip its attention went. */
  drawStrip() {
    const canvas = this.strip, ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (!width || !this.frames) return;
    [canvas.width, canvas.height] = [width, height];
    const pen = canvas.getContext("2d"), count = this.frames.length, columns = this.steps.length;
    this.steps.forEach((step, i) => {
      const left = Math.round(i * width / columns), right = Math.round((i + 1) * width / columns);
      const top = Math.max(...step.frames);
      pen.fillStyle = COLOURS.active;
      step.frames.forEach((mass, f) => {
        const y = Math.round(f * height / count);
        pen.globalAlpha = top ? Math.pow(mass / top, 1.3) : 0;
        pen.fillRect(left, y, right - left - (columns < 80 ? ratio : 0), Math.round((f + 1) * height / count) - y);
      });
      if (i === this.at) {
        pen.globalAlpha = 1;
        pen.strokeStyle = getComputedStyle(document.body).color;
        pen.lineWidth = 2 * ratio;
        pen.strokeRect(left + ratio, ratio, right - left - 2 * ratio - (columns < 80 ? ratio : 0), height - 2 * ratio);
      }
    });
    canvas.setAttribute("aria-label", "Attention of each word to the frames, from the first at the top to the last: " +
      this.steps.map((s) => `${plain(s.text)} ${s.attention ? this.where(s.frames.indexOf(Math.max(...s.frames))) + " s" : "not known"}`).join(", "));
  }
}

function hatch(pen, x, y, w, h) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  pen.strokeStyle = COLOURS.hatch;
  pen.lineWidth = 2;
  pen.beginPath();
  for (let d = -h; d < w; d += 8) {
    pen.moveTo(x + d, y + h);
    pen.lineTo(x + d + h, y);
  }
  pen.stroke();
  pen.restore();
}

function picture(data) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a frame's picture cannot be read"));
    image.src = `data:image/jpeg;base64,${data}`;
  });
}

/* The clip, and the question about it. */
function choose(clip) {
  state.clip = clip;
  for (const button of $("stories").children)
    button.setAttribute("aria-pressed", String(clip.story === +button.dataset.seed));
  $("drop").classList.toggle("on", Boolean(clip.files));
  $("chosen").textContent = clip.files ? clip.files.map((file) => file.name).join(", ") : "Drop a clip here";
  $("hint").textContent = clip.files ? `${(weight(clip.files) / 1e6).toFixed(1)} MB` : "or choose a file, or several";
  say("");
}

const weight = (files) => files.reduce((sum, file) => sum + file.size, 0);

function say(message) {
  $("message").textContent = message;
  $("message").hidden = !message;
}

function settings() {
  const given = {};
  for (const name of ["merge_ratio", "prune_ratio", "skip_ratio"])
    if ($(name).value !== "") given[name] = +$(name).value;
  return given;
}

function ask() {
  const { clip } = state, method = $("method").value, given = settings();
  if (!clip) return say("Choose a story, or drop a clip.");
  const more = Object.entries(given).map(([name, value]) => `${name} ${value}`);
  run({ clip, method, given, question: $("question").value, frames: $("frames").value, title: [method, ...more].join(", ") }, true);
}

function compare(pane) {
  run({ ...pane.asked, method: "full", given: {}, title: "full model" }, false);
}

async function run(asked, alone) {
  const limit = state.config.max_bytes;
  const { files } = asked.clip;
  if (files && weight(files) > limit) return say(`${files.length > 1 ? "These clips are" : "The clip is"} larger than ${limit >> 20} MiB.`);
  state.aborting?.abort();
  const aborting = (state.aborting = new AbortController());
  for (const pane of state.panes) pane.pause();
  const pane = new Pane(asked);
  say("");
  if (alone) {
    state.panes = [];
    $("panes").replaceChildren();
  } else for (const other of state.panes) other.find(".compare").hidden = true;
  $("panes").classList.toggle("two", !alone);
  state.panes.push(pane);
  $("panes").append(pane.root);
  if (!alone) state.panes[0].draw();
  state.focus = pane;
  $("legend").hidden = false;
  if (alone) $("skipped").hidden = true;
  busy(true);
  try {
    await answer(pane, aborting.signal);
  } catch (error) {
    if (error.name === "AbortError") pane.stopped("stopped");
    else {
      say(error.message);
      pane.stopped("no answer");
    }
  } finally {
    if (state.aborting === aborting) busy(false);
  }
}

async function answer(pane, signal) {
  const { clip, method, given, question, frames } = pane.asked;
  const query = new URLSearchParams({ question, method, frames });
  if (Object.keys(given).length) query.set("settings", JSON.stringify(given));
  for (const file of clip.files || []) query.append("name", file.name);
  if (clip.files?.length > 1) query.set("sizes", clip.files.map((file) => file.size));
  if (!clip.files) query.set("story", clip.story);
  const body = clip.files && new Blob(clip.files);
  let response;
  try {
    response = await fetch(`/viewer/ask?${query}`, { method: "POST", body, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Error(event.message);
      ended ||= event.event === "done";
      await pane[event.event](event);
    }
  }
  if (!ended) throw new Error("The answer broke off: the connection was lost.");
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function busy(on) {
  $("go").hidden = on;
  $("stop").hidden = !on;
  document.body.dataset.busy = on ? "yes" : "no";
}

function key(event) {
  const pane = state.focus;
  if (!pane || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("form, button") || (event.target.type === "range" && event.key !== " ")) return;
  const moves = { ArrowLeft: pane.at - 1, ArrowRight: pane.at + 1, Home: 0, End: pane.steps.length - 1 };
  if (event.key === " ") pane.play();
  else if (event.key in moves) pane.choose(moves[event.key]);
  else return;
  event.preventDefault();
}

async function begin() {
  const response = await fetch("/viewer/config");
  if (!response.ok) throw new Error(await refusal(response));
  const config = (state.config = await response.json());
  $("model").textContent = config.model;
  $("question").value = config.question;
  $("frames").value = config.frames;
  for (const { name, about } of config.methods) {
    const option = new Option(name, name, false, name === "dycoke+");
    option.title = about;
    $("method").add(option);
  }
  config.stories.forEach((seed, i) => {
    const button = document.createElement("button"), image = new Image();
    Object.assign(button, { type: "button", className: "clip" });
    button.dataset.seed = seed;
    Object.assign(image, { src: `/viewer/stories/${seed}.jpg`, alt: `Story ${i + 1}` });
    button.append(image);
    button.onclick = () => choose({ story: seed });
    $("stories").append(button);
  });
  choose({ story: config.stories[0] });
}

$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("stop").onclick = () => state.aborting?.abort();
$("file").onchange = () => $("file").files.length && choose({ files: [...$("file").files] });
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("form").classList.toggle("over", kind === "dragover");
    const files = kind === "drop" ? [...event.dataTransfer.files] : [];
    if (files.length) choose({ files });
  });
document.addEventListener("keydown", key);
document.addEventListener("pointermove", (event) => {
  pointer.moved = event.clientX !== pointer.x || event.clientY !== pointer.y;
  Object.assign(pointer, { x: event.clientX, y: event.clientY });
}, true);
window.addEventListener("resize", () => state.panes.forEach((pane) => pane.drawStrip()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.panes.forEach((pane) => pane.draw()));
begin().catch((error) => say(error.message));
