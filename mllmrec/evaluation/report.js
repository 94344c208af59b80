"use strict";
// The users, items and errors of report.html, from the JSON in #data. Every text is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const state = { left: 0, right: Math.min(1, data.variants.length - 1), sort: {}, find: {} };

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const rankText = rank => (rank === null ? "–" : Number.isInteger(rank) ? String(rank) : rank.toFixed(1));

// Tables: columns of {name, value(row): number or text to sort by, cell(row): node or text, text: not a number}

function table(key, caption, columns, rows, words) {
  const { column, down } = state.sort[key] ?? { column: 0, down: false };
  const find = (state.find[key] ?? "").toLowerCase().split(/\s+/);
  const kept = words ? rows.filter(row => find.every(word => words(row).includes(word))) : [...rows];
  const { value } = columns[column];
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last
    return (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true })) * (down ? -1 : 1);
  };
  kept.sort(order);
  const head = columns.map((own, n) => el("th", {
    scope: "col", class: own.text ? null : "n", "aria-sort": n === column ? (down ? "descending" : "ascending") : "none",
  }, el("button", { type: "button", onclick: () => {
    state.sort[key] = { column: n, down: n === column && !down };
    show();
    byId(key).querySelectorAll("th button")[n].focus();
  } }, own.name)));
  const body = kept.map(row => el("tr", {}, ...columns.map(own => el("td", { class: own.text ? null : "n" }, own.cell(row)))));
  const filled = el("table", { id: key }, el("caption", {}, caption(kept.length)), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption(kept.length) }, filled);
}

function search(key, label) {
  const input = el("input", { type: "search", value: state.find[key] ?? "", id: key + "-find", oninput: event => {
    state.find[key] = event.target.value;
    const found = pages[key]().find(part => part.classList.contains("scroll"));
    byId(key).closest(".scroll").replaceWith(found); // not the field: it keeps its cursor
  } });
  return el("label", {}, label + " ", input);
}

function choose(side, label) {
  const options = data.variants.map((name, n) => el("option", { value: n, selected: n === state[side] ? "" : null }, name));
  return el("label", {}, label + " ", el("select", { id: side, onchange: event => {
    state[side] = Number(event.target.value);
    show();
    byId(side).focus();
  } }, ...options));
}

// Covers

function cover(item) {
  if (!item.image) return null;
  return el("button", { type: "button", class: "cover", "aria-label": "enlarge the cover of " + item.title, onclick: () => {
    byId("large").replaceChildren(el("img", { src: item.image, alt: "cover of " + item.title }), el("p", {}, item.title));
    byId("enlarged").showModal();
  } }, el("img", { src: item.image, alt: "", loading: "lazy" }));
}

const figure = (item, attributes, ...more) => el("figure", attributes, cover(item), el("figcaption", {}, ...more, item.title));

// Users

function usersPage() {
  const { left, right } = state;
  const moved = user => (user.ranks[left] === null || user.ranks[right] === null ? null : user.ranks[right] - user.ranks[left]);
  const number = (name, value) => ({ name, value, cell: row => rankText(value(row)) });
  const columns = [
    { name: "user", text: true, value: user => user.id, cell: user => (user.details ? el("a", { href: "#user-" + encodeURIComponent(user.id) }, user.id) : user.id) },
    number("history", user => user.length),
    { name: "target", text: true, value: user => user.target ?? "", cell: user => user.target ?? "not in the list" },
    number("training users of the target", user => user.popularity),
    number("rank, " + data.variants[left], user => user.ranks[left]),
    number("rank, " + data.variants[right], user => user.ranks[right]),
    { name: "places gained", value: moved, cell: user => (moved(user) > 0 ? "+" : "") + rankText(moved(user)) },
  ];
  const words = user => [user.id, user.target ?? "", ...(user.details?.blocks.map(block => block.text) ?? [])].join(" ").toLowerCase();
  const detailed = data.users.filter(user => user.details).length;
  const note = detailed < data.users.length ? ` ${detailed} of them can be opened: the file would be too large with all.` : "";
  const caption = n => `${n} of ${data.users.length} users.${note} Places gained: how far ${data.variants[left]} is above ${data.variants[right]}.`;
  return [el("h2", {}, "Users"), el("p", { class: "controls" }, choose("left", "variant"), choose("right", "beside"), search("users", "find")), table("users", caption, columns, data.users, words)];
}

// Words of `after` that are not part of the longest common subsequence with `before`, marked.
function changes(before, after) {
  const [a, b] = [before.split(" "), after.split(" ")];
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const parts = [];
  for (let i = 0, j = 0; j < b.length; j++) {
    while (i < a.length && a[i] !== b[j] && common[i + 1][j] >= common[i][j + 1]) i++;
    const kept = i < a.length && a[i] === b[j];
    if (kept) i++;
    parts.push(kept ? b[j] : el("mark", {}, b[j]), " ");
  }
  return parts;
}

function candidates(details, side) {
  const n = state[side], ranks = details.ranks[n];
  const heading = el("h3", {}, "Candidates, " + data.variants[n]);
  if (!ranks) return el("div", {}, heading, el("p", {}, "This variant has not scored the user."));
  const order = ranks.map((_, index) => index).sort((x, y) => ranks[x] - ranks[y]);
  return el("div", {}, heading, el("ol", { class: "candidates" }, ...order.map(index => {
    const item = data.items[details.candidates[index]], hit = details.has_target && index === 0;
    return el("li", { class: hit ? "hit" : null }, el("span", { class: "rank" }, rankText(ranks[index])), cover(item), el("span", {}, item.title, hit ? el("strong", {}, " (target)") : null), el("span", { class: "n" }, fixed(details.scores[n][index], 3)));
  })));
}

function userPage(user) {
  const { blocks, left_out } = user.details;
  const open = data.users.filter(other => other.details), place = open.indexOf(user);
  const link = (other, text) => (other ? el("a", { href: "#user-" + encodeURIComponent(other.id) }, text) : el("span", {}, text));
  const history = blocks.map((block, n) => el("section", { class: "block" },
    el("div", { class: "items" }, ...block.items.map(index => figure(data.items[index], {}))),
    el("p", {}, ...(n ? changes(blocks[n - 1].text, block.text) : [block.text]), block.loops ? el("strong", {}, " (repeats itself)") : null),
  ));
  const seen = [...new Set(blocks.flatMap(block => block.items))].map(index => data.items[index]).filter(item => item.summary);
  const summaries = el("details", {}, el("summary", {}, "Summaries of the images"), el("dl", {}, ...seen.flatMap(item => [el("dt", {}, item.title), el("dd", {}, item.summary)])));
  return [
    el("p", { class: "controls" }, link(open[place - 1], "previous"), link(open[place + 1], "next"), el("a", { href: "#users" }, "all users")),
    el("h2", {}, "User " + user.id),
    el("p", {}, "The history block by block, oldest first, with what this run wrote as the preference after each block; new words are marked.", left_out.length ? ` ${left_out.length} older items were left out of the prompt.` : ""),
    ...history, seen.length ? summaries : null,
    el("p", { class: "controls" }, choose("left", "variant"), choose("right", "beside")),
    el("div", { class: "beside" }, candidates(user.details, "left"), data.variants.length > 1 ? candidates(user.details, "right") : null),
  ].filter(node => node);
}

// Errors

function means(users) {
  const ranks = users.map(user => user.ranks[state.left]).filter(rank => rank !== null);
  const mean = rule => (ranks.length ? 100 * ranks.reduce((sum, rank) => sum + rule(rank), 0) / ranks.length : null);
  return { n: ranks.length, hr: mean(r => r <= 5), mrr: mean(r => (r <= 5) / r), ndcg: mean(r => (r <= 5) / Math.log2(r + 1)) };
}

function groupsTable(key, name, value) {
  const sorted = data.users.map(value).sort((a, b) => a - b);
  const bounds = [...new Set([0.25, 0.5, 0.75].map(share => sorted[Math.floor(share * (sorted.length - 1))])), Infinity];
  const rows = bounds.map((upper, n) => {
    const lower = n ? bounds[n - 1] + 1 : sorted[0];
    return { lower, upper: Math.min(upper, sorted.at(-1)), ...means(data.users.filter(user => value(user) >= lower && value(user) <= upper)) };
  }).filter(row => row.n);
  const number = (label, key, digits) => ({ name: label, value: row => row[key], cell: row => fixed(row[key], digits) });
  const columns = [{ name, value: row => row.lower, cell: row => `${row.lower} to ${row.upper}` }, number("users", "n", 0), number("HR@5", "hr", 1), number("MRR@5", "mrr", 1), number("NDCG@5", "ndcg", 1)];
  return table(key, () => `By ${name}, x100; ranks of ties are their mean`, columns, rows);
}

function errorsPage() {
  const ranks = data.users.map(user => user.ranks[state.left]).filter(rank => rank !== null);
  const counts = new Map();
  for (const rank of ranks) counts.set(Math.round(rank), (counts.get(Math.round(rank)) ?? 0) + 1);
  const most = Math.max(1, ...counts.values());
  const rows = [...counts].map(([rank, n]) => ({ rank, n }));
  const bar = n => el("span", { class: "bar", style: `width:${(100 * n / most).toFixed(1)}%` });
  const columns = [{ name: "rank", value: row => row.rank, cell: row => String(row.rank) }, { name: "users", value: row => row.n, cell: row => String(row.n) }, { name: "share of the largest", text: true, value: row => row.n, cell: row => bar(row.n) }];
  const above = data.above[data.variants[state.left]].map(([title, times, lists]) => ({ title, times, lists, share: 100 * times / lists }));
  const aboveColumns = [
    { name: "negative", text: true, value: row => row.title, cell: row => row.title },
    { name: "above the target", value: row => -row.times, cell: row => String(row.times) },
    { name: "of lists", value: row => row.lists, cell: row => String(row.lists) },
    { name: "%", value: row => row.share, cell: row => fixed(row.share, 0) },
  ];
  state.sort.above ??= { column: 1, down: false };
  return [
    el("h2", {}, "Errors"), el("p", { class: "controls" }, choose("left", "variant")),
    table("ranks", () => `Ranks of the target: ${ranks.length} users`, columns, rows),
    groupsTable("lengths", "length of the history", user => user.length),
    groupsTable("popularities", "training users of the target", user => user.popularity),
    table("above", () => "The negatives that are most often above the target", aboveColumns, above),
  ];
}

// Items and rejected rows

function itemsPage() {
  const columns = [
    { name: "item", text: true, value: item => item.id, cell: item => item.id },
    { name: "cover", text: true, value: item => (item.image ? 0 : 1), cell: item => cover(item) ?? "none" },
    { name: "title", text: true, value: item => item.title, cell: item => item.title },
    { name: "summary", text: true, value: item => item.summary, cell: item => item.summary },
    { name: "words", value: item => item.summary.split(" ").length, cell: item => String(item.summary ? item.summary.split(" ").length : 0) },
    { name: "training users", value: item => item.popularity, cell: item => String(item.popularity) },
    { name: "marks", text: true, value: item => (item.loops ? "0" : item.cut ? "1" : "2"), cell: item => [item.loops ? "repeats itself" : "", item.cut ? "cut" : ""].filter(mark => mark).join(", ") },
  ];
  const words = item => [item.id, item.title, item.summary].join(" ").toLowerCase();
  return [el("h2", {}, "Items"), el("p", { class: "controls" }, search("items", "find")), table("items", n => `${n} of ${data.items.length} items, those of the users that can be opened`, columns, data.items, words)];
}

function rejectedPage() {
  const columns = [{ name: "row", text: true, value: row => row[0], cell: row => row[0] }, { name: "reason", text: true, value: row => row[1], cell: row => row[1] }];
  const tables = data.rejected.map((own, n) => table("rejected-" + n, () => `${own.file}: ${own.rows} rows${own.rows > own.first.length ? ", the first " + own.first.length : ""}`, columns, own.first));
  return [el("h2", {}, "Rejected rows"), ...(tables.length ? tables : [el("p", {}, "There are none.")])];
}

// One page at a time; the address names it, so that a link opens it.

const pages = { users: usersPage, errors: errorsPage, items: itemsPage, rejected: rejectedPage };

function show() {
  let wanted = location.hash.slice(1);
  try { wanted = decodeURIComponent(wanted); } catch { /* no address of this page */ }
  const asked = wanted.startsWith("user-") ? wanted.slice(5) : null;
  const user = asked === null ? null : data.users.find(other => other.id === asked);
  const name = asked !== null ? "users" : Object.hasOwn(pages, wanted) ? wanted : "overview";
  byId("overview").hidden = name !== "overview";
  byId("page").hidden = name === "overview";
  const missing = asked !== null && !user?.details;
  const note = missing ? [el("p", {}, user ? `User ${asked} is not in this file, which would be too large with all.` : `There is no user ${asked}.`)] : [];
  if (name !== "overview") byId("page").replaceChildren(...note, ...(user?.details ? userPage(user) : pages[name]()));
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === "#" + name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

byId("enlarged").addEventListener("click", event => { if (event.target === byId("enlarged")) byId("enlarged").close(); });
window.addEventListener("hashchange", () => {
  show();
  window.scrollTo(0, 0);
  const heading = document.querySelector("#page:not([hidden]) h2, #overview:not([hidden]) h2");
  heading?.setAttribute("tabindex", "-1");
  heading?.focus();
});
document.querySelector("nav").hidden = false;
show();
