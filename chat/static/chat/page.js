// The chat page, made live. Without this file it works as well: its forms post, its links lead on.
// All HTML comes from the server, which has sanitised what a model said; what streams in is text.

const PATIENCE = 5000; // of silence, until the server is asked what a run waits for

const body = document.body;
const threadId = body.dataset.thread;
const turns = document.getElementById("turns");
const notice = document.getElementById("notice");
const composer = document.getElementById("composer");
const question = document.getElementById("question");
const stopNow = document.getElementById("stop");
const earlier = new URLSearchParams(location.search).has("before");
const stepTemplate = document.getElementById("step");

class Refused extends Error {}

let stream = null; // what is listened to: of a run, or of the thread
let key = null; // of the question in the composer, so that sending it again cannot ask it twice

document.documentElement.classList.add("js");

// Talking to the server

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function say(text, kind = "") {
  if (notice.textContent !== text) notice.textContent = text;
  notice.className = kind;
}

async function ask(url, options = {}) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status >= 500) throw new Error("The server has a problem.");
  // Whoever is not signed in any more is sent to the door.
  if (response.status === 401 || response.redirected) {
    throw new Refused("You are signed out. Sign in again, in another tab: what you wrote stays here.");
  }
  return response;
}

function post(url, data, headers = {}) {
  // That of now: whoever signs in again, in another tab, gets a new one.
  const cookie = document.cookie.match(/(?:^|; )csrftoken=([^;]+)/);
  const token = cookie?.[1] ?? document.querySelector("[name=csrfmiddlewaretoken]").value;
  return ask(url, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      "X-CSRFToken": token,
      "X-Asked-By": body.dataset.user,
      ...headers,
    },
    body: JSON.stringify(data),
  });
}

async function why(response) {
  const told = await response.json().catch(() => ({}));
  return told.error || "The server refused it.";
}

async function documentAt(url) {
  const response = await ask(url);
  if (!response.ok) throw new Refused("This is not here any more.");
  return new DOMParser().parseFromString(await response.text(), "text/html");
}

// Turns

async function turnOf(runId) {
  const turn = (await documentAt(`/runs/${runId}`)).querySelector(".turn");
  dress(turn);
  return turn;
}

// Put the turn where it stands in the conversation, in place of an earlier state of it.
function put(turn) {
  const old = document.getElementById(turn.id);
  // Told by the thread as well, and listened to already.
  if (old?.hasAttribute("aria-busy") && turn.hasAttribute("aria-busy")) return;
  const open = old?.querySelector(".steps")?.open;
  keepingTheEnd(() => {
    if (old) {
      turn.querySelector(".steps").open = open;
      const focused = old.contains(document.activeElement);
      old.replaceWith(turn);
      if (focused) question.focus({ preventScroll: true });
    } else {
      const number = (each) => Number(each.dataset.turn);
      const next = [...turns.children].find((each) => number(each) > number(turn));
      turns.insertBefore(turn, next ?? null);
    }
  });
}

function dress(root) {
  for (const pre of root.querySelectorAll(".prose pre")) {
    if (!navigator.clipboard) break;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(pre.querySelector("code")?.textContent ?? pre.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    const frame = document.createElement("div");
    frame.className = "code";
    pre.replaceWith(frame);
    frame.append(pre, button);
  }
  for (const time of root.querySelectorAll("time")) {
    const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
    time.textContent = format.format(new Date(time.dateTime));
  }
}

function keepingTheEnd(change) {
  const page = document.scrollingElement;
  const atTheEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (atTheEnd) page.scrollTop = page.scrollHeight;
}

const going = () => turns.querySelector(".turn[aria-busy]");
const listensToARun = () => stream instanceof RunStream && !stream.closed;

// Listening

function follow() {
  stream?.close();
  stream = null;
  const turn = going();
  stopNow.hidden = !turn;
  if (turn) {
    stopNow.setAttribute("form", `stop-${turn.dataset.run}`);
    stream = new RunStream(turn);
  } else if (threadId && !document.hidden && !earlier) {
    stream = new ThreadStream();
  }
}

// A stream that is begun again, where it broke off, until it is closed. The browser does so by
// itself unless a proxy or the server has answered with an error.
class Stream {
  constructor(address, kinds, last) {
    this.address = address;
    this.kinds = kinds;
    this.last = last;
    this.failures = 0;
    this.closed = false;
    this.open();
  }

  open() {
    this.source = new EventSource(this.last ? `${this.address}?after=${this.last}` : this.address);
    this.source.onopen = () => {
      this.failures = 0;
      if (notice.classList.contains("away")) say("");
    };
    this.source.onerror = () => this.broken();
    for (const [kind, heed] of Object.entries(this.kinds)) {
      this.source.addEventListener(kind, (event) => {
        this.last = event.lastEventId || this.last;
        heed(JSON.parse(event.data));
      });
    }
    this.source.addEventListener("stream.closed", () => this.refused());
  }

  // The server has ended it, for the right to it is lost. It may have been renewed in another tab.
  async refused() {
    this.source.close();
    await pause(1000);
    if (!this.closed && (await this.stillThere())) this.open();
  }

  async broken() {
    if (this.closed) return;
    say("Reconnecting…", "away");
    if (this.source.readyState !== EventSource.CLOSED) return;
    this.failures += 1;
    await pause(Math.min(15000, 500 * 2 ** this.failures));
    if (!this.closed && (await this.stillThere())) this.open();
  }

  // Whether there is anything to listen to, as far as one can tell.
  async stillThere() {
    return true;
  }

  close() {
    this.closed = true;
    this.source.close();
  }
}

class RunStream extends Stream {
  constructor(turn) {
    super(`/api/chat/runs/${turn.dataset.run}/events`, {
      "run.status": (told) => this.status(told),
      "message.delta": (told) => this.text(told),
      "step.started": (told) => this.step(told),
      "step.finished": (told) => this.step(told),
      gap: () => this.write(" […] "),
      "run.completed": () => this.end(),
      "run.failed": () => this.end(),
      "run.cancelled": () => this.end(),
      "run.deleted": () => this.end(),
    }, turn.dataset.heard);
    this.turn = turn;
    this.attempt = 0;
    this.speaking = 0;
    this.watch();
  }

  get draft() {
    return this.turn.querySelector(".draft");
  }

  heard() {
    this.heardAt = Date.now();
  }

  status({ attempt }) {
    if (attempt === this.attempt) return;
    // What an earlier attempt has said counts for nothing.
    this.attempt = attempt;
    this.draft.textContent = "";
    this.turn.querySelector(".steps ol").replaceChildren();
    if (attempt) this.tell("Answering.");
    this.heard();
  }

  text({ step, text }) {
    // The answer is what the last call of the model says.
    if (step !== this.speaking) this.draft.textContent = "";
    this.speaking = step;
    this.write(text);
  }

  write(text) {
    this.heard();
    // What shows words in another order than they were written in stays out (chat/markdown.py).
    keepingTheEnd(() => this.draft.append(text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "")));
    this.turn.classList.add("speaks");
  }

  step(told) {
    this.heard();
    const list = this.turn.querySelector(".steps ol");
    let row = list.querySelector(`[data-step="${Number(told.step)}"]`);
    if (!row) {
      row = stepTemplate.content.firstElementChild.cloneNode(true);
      row.dataset.step = told.step;
      list.append(row);
    }
    const put = (name, text) => (row.querySelector(`.${name}`).textContent = text);
    put("kind", told.kind);
    put("name", told.name);
    const ended = told.durationMs !== undefined;
    const ms = told.durationMs;
    put("time", !ended ? "…" : ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`);
    if (told.promptTokens || told.completionTokens) {
      put("tokens", `${told.promptTokens} in, ${told.completionTokens} out`);
    }
    put("problem", told.error ?? "");
    if (told.kind === "tool") this.tell(ended ? "Answering." : `Using ${told.name}.`);
  }

  tell(text) {
    const state = this.turn.querySelector(".state");
    if (state && state.textContent !== text) state.textContent = text;
  }

  // In the silence, say what the run waits for: the server knows.
  async watch() {
    this.heard();
    while (!this.closed) {
      await pause(PATIENCE / 5);
      if (this.closed || Date.now() - this.heardAt < PATIENCE) continue;
      this.heard();
      const turn = await turnOf(this.turn.dataset.run).catch(() => null);
      if (this.closed || !turn) continue;
      if (turn.hasAttribute("aria-busy")) this.tell(turn.querySelector(".state").textContent);
      else this.settle(turn);
    }
  }

  async stillThere() {
    try {
      const turn = await turnOf(this.turn.dataset.run);
      if (turn.hasAttribute("aria-busy")) return true;
      this.settle(turn);
    } catch (error) {
      if (!(error instanceof Refused)) return true;
      this.close();
      say(error.message, "problem");
    }
    return false;
  }

  async end() {
    this.close();
    while (true) {
      try {
        return this.settle(await turnOf(this.turn.dataset.run));
      } catch (error) {
        if (error instanceof Refused) return say(error.message, "problem");
        say("Reconnecting…", "away");
        await pause(2000);
      }
    }
  }

  settle(turn) {
    this.close();
    if (notice.classList.contains("away")) say("");
    const said = this.draft?.textContent;
    put(turn);
    // What a stopped run had said is written down when its worker has let go of it.
    if (said && turn.dataset.status === "cancelled" && !turn.querySelector(".prose")) {
      pause(1500).then(() => turnOf(turn.dataset.run)).then(put, () => {});
    }
    follow();
  }
}

class ThreadStream extends Stream {
  constructor() {
    // Its events are numbered, each question and each outcome: those of what is shown are not told.
    // Up to the first one that is missing here.
    let last = turns.firstElementChild;
    const number = (turn) => Number(turn.dataset.turn);
    for (let next; (next = last?.nextElementSibling) && number(next) === number(last) + 1; ) last = next;
    super(`/api/chat/threads/${threadId}/events`, {
      "message.created": ({ runId }) => this.asked(runId),
    }, last ? 2 * Number(last.dataset.turn) + 2 : 0);
  }

  async stillThere() {
    try {
      if ((await ask(`/api/chat/threads/${threadId}`)).ok) return true;
      say("This conversation is not here any more.", "problem");
    } catch (error) {
      if (!(error instanceof Refused)) return true;
      say(error.message, "problem");
    }
    this.close();
    return false;
  }

  // In another window, or by another program.
  async asked(runId) {
    if (document.getElementById(runId)) return;
    try {
      put(await turnOf(runId));
    } catch (error) {
      if (error instanceof Refused) return;
      await pause(2000);
      if (stream === this) follow();
      return;
    }
    if (!this.closed && going()) follow();
  }
}

// What one does

composer.addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (!content || composer.hasAttribute("aria-busy")) return;
  const asked = { content, model: composer.elements.model.value || null };
  if (threadId) asked.threadId = threadId;
  key ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("-");
  composer.setAttribute("aria-busy", "true");
  question.readOnly = true; // what is written meanwhile would be lost
  say("");
  try {
    const response = await post("/api/chat/messages", asked, { "Idempotency-Key": key });
    if (!response.ok) throw new Refused(await why(response));
    const accepted = await response.json();
    forget();
    if (!threadId || earlier) return location.assign(`/threads/${accepted.threadId}`);
    document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
    const turn = await turnOf(accepted.runId).catch(() => null);
    if (turn) put(turn);
    else say("Your question was taken. Reload the page to see it.", "problem");
    if (!listensToARun()) follow();
    const current = document.querySelector("#thread-list [aria-current]")?.parentElement;
    current?.parentElement.prepend(current);
  } catch (error) {
    if (error instanceof Refused) key = null;
    const hint = error instanceof Refused ? "" : " Send it again when you like.";
    say(error.message + hint, "problem");
  } finally {
    question.readOnly = false;
    composer.removeAttribute("aria-busy");
  }
});

function forget() {
  key = null;
  question.value = "";
  sessionStorage.removeItem(draftName);
}

document.addEventListener("submit", async (event) => {
  const url = event.target.dataset.api;
  if (!url) return;
  event.preventDefault();
  const runId = event.target.closest(".turn").dataset.run;
  try {
    const response = await post(url, {});
    // 409: it has come to an end, or somebody else was first. The turn shows which.
    if (!response.ok && response.status !== 409) throw new Refused(await why(response));
    put(await turnOf(runId));
    follow();
  } catch (error) {
    say(error.message, "problem");
  }
});

document.addEventListener("click", async (event) => {
  const link = event.target.closest("[data-more]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  try {
    const page = await documentAt(link.href);
    const list = document.getElementById(link.dataset.more);
    const found = [...page.getElementById(link.dataset.more).children];
    const first = found[0]?.querySelector("a, summary");
    if (link.id === "earlier") {
      found.forEach(dress);
      // Whoever has it read out waits for the answer, not for all that was said before.
      const log = list.closest("[aria-live]");
      log.setAttribute("aria-live", "off");
      pause(1000).then(() => log.setAttribute("aria-live", "polite"));
      const below = document.scrollingElement.scrollHeight - scrollY;
      list.prepend(...found);
      scrollTo(0, document.scrollingElement.scrollHeight - below);
    } else {
      list.append(...found);
    }
    const next = page.getElementById(link.id);
    if (next) link.href = next.getAttribute("href");
    else link.remove();
    first?.focus({ preventScroll: true });
  } catch (error) {
    say(error.message, "problem");
  }
});

// What unfolds at the end of the page would hide behind the composer.
document.addEventListener("toggle", (event) => {
  if (event.target.open) event.target.scrollIntoView({ block: "nearest" });
}, true);

// Where there is no Shift, Enter begins a line.
const hasKeys = !matchMedia("(pointer: coarse)").matches;
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || !hasKeys) return;
  event.preventDefault();
  composer.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || stopNow.hidden) return;
  if (document.querySelector(":popover-open")) return;
  stopNow.click();
});

// What is written and not sent outlives a reload.
const draftName = `draft ${threadId ?? ""}`;
composer.addEventListener("input", () => {
  key = null;
  sessionStorage.setItem(draftName, question.value);
});
// Whoever signs in next in this window finds nothing of it.
document.querySelector('form[action$="/logout"]')?.addEventListener("submit", () => sessionStorage.clear());
question.value ||= sessionStorage.getItem(draftName) ?? "";

document.addEventListener("visibilitychange", () => {
  if (!listensToARun()) follow();
});

dress(document);
if (threadId && !location.hash) {
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}
if (hasKeys && document.activeElement === body) question.focus({ preventScroll: true });
follow();
