"use strict";
// Texts, colours, numbers and elements. Texts out of a run reach the page as text nodes only, never as HTML.

const TEXTS = JSON.parse(document.getElementById("texts").textContent);
const DATA = JSON.parse(document.getElementById("data").textContent);
const state = {
  lang: "en",
  theme: "light",
  runs: DATA.runs,
  version: DATA.live,
  site: { run: 0, measure: "sqnr", group: "all", format: "", filter: "", sort: "sqnr", down: false },
  update: { run: 0, measure: "ratio" },
  panel: null, // {kind: "site" | "weight", name, at: index of a sampled step, or null for the last}
};

function stored(key, value) {
  // a page opened from a file may have no storage
  try {
    if (value === undefined) return localStorage.getItem("mezzo-" + key);
    localStorage.setItem("mezzo-" + key, value);
  } catch {
    /* then the choice lasts as long as the page */
  }
  return null;
}

function t(key, values = {}) {
  const both = TEXTS[key];
  if (!both) throw new Error("no text " + key);
  return both[state.lang === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "–");
}

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

const $ = (id) => document.getElementById(id);
const fill = (id, ...children) => $(id).replaceChildren(...children.flat().filter((child) => child != null));
const note = (text) => el("p", { class: "note" }, text);
// Plotly reads a little HTML in its labels; this leaves it nothing to read.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, most) => plain(text.length > most ? "…" + text.slice(1 - most) : text);

const value = (v) => (typeof v === "string" ? Number(v) : v); // "NaN", "Infinity"
const known = (v) => v != null && !Number.isNaN(value(v));
const locale = () => (state.lang === "zh" ? "zh-CN" : "en-US");

function count(v) {
  return known(v) ? value(v).toLocaleString(locale()) : "–";
}

function figures(v, digits = 4) {
  if (v == null) return "–";
  v = value(v);
  if (Number.isNaN(v)) return "NaN";
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  if (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6)) return v.toExponential(2).replace("-", "−");
  return v.toLocaleString(locale(), { maximumSignificantDigits: digits, useGrouping: Math.abs(v) >= 1e4 });
}

function share(v) {
  if (!known(v)) return "–";
  v = value(v);
  if (v === 0) return "0%";
  return v < 1e-7
    ? (v * 100).toExponential(1).replace("-", "−") + "%"
    : (v * 100).toLocaleString(locale(), { maximumSignificantDigits: 3 }) + "%";
}

const loss = (v) => (known(v) && Number.isFinite(value(v)) ? value(v).toFixed(4) : figures(v));
const decibel = (v) => (known(v) ? (Number.isFinite(value(v)) ? value(v).toFixed(1) + " dB" : "∞ dB") : "–");

function bytes(v) {
  if (!known(v)) return "–";
  let size = value(v),
    unit = 0;
  while (size >= 1024 && unit < 4) {
    size /= 1024;
    unit += 1;
  }
  return figures(size, 3) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  const s = Math.round(value(seconds)),
    two = (n) => String(n).padStart(2, "0");
  return s >= 3600
    ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`
    : `${Math.floor(s / 60)}:${two(s % 60)}`;
}

// Okabe and Ito's colours, which people with any colour vision tell apart; each run has a dash of its own as well.
const PALETTE = {
  light: ["#0072B2", "#D55E00", "#008060", "#A8487F", "#8A6100", "#3A8FC7", "#555555"],
  dark: ["#56B4E9", "#FF9E4A", "#2BC79A", "#E79AC6", "#F0E442", "#9AD0F5", "#BBBBBB"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const colour = (index) => PALETTE[state.theme][index % PALETTE[state.theme].length];
const dash = (index) => DASHES[index % DASHES.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const several = () => state.runs.length > 1;
const swatch = (index) =>
  el("span", {
    class: "swatch",
    "aria-hidden": "true",
    style: { borderColor: colour(index), borderTopStyle: ["solid", "dashed", "dotted"][index % 3] },
  });
