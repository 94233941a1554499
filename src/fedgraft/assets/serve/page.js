"use strict";

const at = id => document.getElementById(id);
const made = (tag, text = "", kind = "") => Object.assign(document.createElement(tag), {textContent: text, className: kind});
const columns = new Map(); // model -> {section, turns, messages}
let key = "";
let running = null;

const headers = () => ({"content-type": "application/json", ...(key ? {authorization: `Bearer ${key}`} : {})});

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function list() {
  say("Looking for models…");
  const response = await fetch("v1/models", {headers: headers()}).catch(() => null);
  if (!response) return say("The server can't be reached.", true);
  if (!response.ok) {
    at("unlock").hidden = false;
    return say(key || response.status !== 401 ? await told(response) : "This server asks for a key.", Boolean(key));
  }
  const names = (await response.json()).data.map(model => model.id);
  const own = names.filter(name => name !== "base" && name !== "shared");
  const first = new Set([...["base", "shared"].filter(name => names.includes(name)), ...own.slice(0, 1)]);
  at("models").replaceChildren(at("models").firstElementChild);
  for (const section of columns.values()) section.section.remove();
  columns.clear();
  for (const name of names) {
    const label = made("label", "", "choice"), box = made("input"), words = made("span", name);
    Object.assign(box, {type: "checkbox", name: "model", value: name, checked: first.has(name)});
    words.title = name;
    box.addEventListener("change", arrange);
    label.append(box, words);
    at("models").append(label);
  }
  at("models").hidden = false;
  say("");
  arrange();
}

const chosen = () => [...document.querySelectorAll("#models input:checked")].map(box => box.value);

function column(name) {
  if (!columns.has(name)) {
    const section = made("section"), turns = made("div", "", "turns");
    Object.assign(turns, {tabIndex: 0, role: "log"});
    turns.setAttribute("aria-label", `Conversation with ${name}`);
    section.append(made("h2", name), turns);
    columns.set(name, {section, turns, messages: []});
  }
  return columns.get(name);
}

function arrange() {
  at("columns").replaceChildren(...chosen().map(name => column(name).section));
}

async function answer(name, text, signal) {
  const {turns, messages} = column(name);
  const asked = [...messages, {role: "user", content: text}];
  const said = made("p", "…", "assistant");
  turns.append(made("p", text, "user"), said);
  const started = performance.now();
  let words = "", reason = "";
  const show = () => {
    said.textContent = words || "…";
    turns.scrollTop = turns.scrollHeight;
  };
  try {
    const body = {model: name, messages: asked, stream: true, temperature: at("temperature").valueAsNumber || 0, max_tokens: at("length").valueAsNumber || 128};
    const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body: JSON.stringify(body), signal});
    if (!response.ok) throw new Error(await told(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") continue;
        const piece = JSON.parse(data);
        if (piece.error) throw new Error(piece.error.message);
        words += piece.choices[0]?.delta.content ?? "";
        reason = piece.choices[0]?.finish_reason ?? reason;
      }
      show();
    }
    if (!words) said.textContent = "(an empty answer)";
  } catch (error) {
    reason = signal.aborted ? "stopped" : "";
    show();
    if (!signal.aborted) turns.append(made("p", error instanceof TypeError ? "The connection was lost." : error.message, "failed"));
  }
  if (words) messages.push({role: "user", content: text}, {role: "assistant", content: words});
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  turns.append(made("p", `${seconds} s${{length: ", cut at its length", stopped: ", stopped"}[reason] ?? ""}`, "note"));
  turns.scrollTop = turns.scrollHeight;
}

at("ask").addEventListener("submit", async event => {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("message").value.trim(), names = chosen();
  if (!text) return;
  if (!names.length) return say("Choose a model first.", true);
  say("");
  at("message").value = "";
  running = new AbortController();
  at("send").textContent = "Stop";
  at("message").required = false;
  await Promise.all(names.map(name => answer(name, text, running.signal)));
  running = null;
  at("send").textContent = "Send";
  at("message").required = true;
});

at("message").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) at("ask").requestSubmit();
  }
});

at("forget").addEventListener("click", () => {
  running?.abort();
  for (const {turns, messages} of columns.values()) {
    turns.replaceChildren();
    messages.length = 0;
  }
});

at("unlock").addEventListener("submit", event => {
  event.preventDefault();
  key = at("key").value.trim();
  list();
});

list();
