
"use strict";
// Names and values of the networks reach the page as text alone: by textContent and by the canvas.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const lowerNames = data.names.map((name) => name.toLowerCase());

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function button(text, onClick) {
  const made = element("button", text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function say(text) {
  byId("status").textContent = text;
}

function shown(value) {
  if (value === null || value === undefined) return "not known";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(5)));
}

// Positions of the networks whose names hold every word of a query.
function find(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  if (words.length) {
    lowerNames.forEach((name, i) => {
      if (words.every((word) => name.includes(word))) found.push(i);
    });
  }
  return found;
}
