// Runs once in the page. `element` holds templates/annotate_pair.html or annotate_image.html, whose buttons name their
// answers and keys; `server` has start, choose and undo of posttrain/annotate/serve.py, each of which returns what to
// show next, or undefined if no answer came.
const find = (selector) => element.querySelector(selector);
const pair = find("#pair"), frames = [...pair.children], images = [...pair.querySelectorAll("img")];
const note = find("#note"), buttons = [...element.querySelectorAll("[data-do]")];
const { things, unshown } = find("#work").dataset;
const KEYS = { escape: "unzoom" };
for (const button of buttons) for (const key of button.dataset.keys.split(" ")) KEYS[key] = button.dataset.do;
const SMALL = 256; // pixels; what is smaller is shown with its pixels as squares
let view = null; // what is shown, as the server described it
let since = null; // when all images were there, ms; null: they are not yet
let busy = false; // an answer is on its way: what is pressed now was meant for the pair or image that is going

function text(selector, words) {
  find(selector).textContent = words;
}

function zoom(event) {
  if (event) {
    const box = event.currentTarget.getBoundingClientRect();
    const share = (at, from, length) => Math.min(100, Math.max(0, (100 * (at - from)) / length));
    pair.style.setProperty("--x", `${share(event.clientX, box.left, box.width)}%`);
    pair.style.setProperty("--y", `${share(event.clientY, box.top, box.height)}%`);
  } else {
    pair.style.removeProperty("--x");
    pair.style.removeProperty("--y");
  }
}

function show(next) {
  view = next;
  since = null;
  const over = !next.pair;
  find("#who").hidden = true;
  find("#work").hidden = false;
  find("#done").hidden = !over;
  pair.hidden = find("#question").hidden = find("#prompt").hidden = over;
  if (over) find("#references").hidden = true;
  text("#note", next.note);
  text("#person", next.name);
  text("#count", `${next.done} of ${next.total}${next.rest ? `, ${next.rest}` : ""}`);
  find("#bar").max = Math.max(1, next.total);
  find("#bar").value = next.done;
  find("[data-do=undo]").disabled = !next.done;
  for (const button of buttons) if (button.dataset.do !== "undo") button.disabled = over;
  pair.classList.remove("zoomed");
  for (const frame of frames) frame.classList.remove("picked");
  zoom(null);
  if (over) {
    text("#done", `All ${next.total} ${things} are done. Thank you!`);
    return;
  }
  text("#prompt", next.prompt);
  const shown = find("#references");
  shown.hidden = !next.references.length;
  shown.replaceChildren(
    ...next.references.map((url, i) => Object.assign(new Image(), { src: url, alt: `reference ${i + 1}`, draggable: false })),
  );
  const { question, styled } = find("#question").dataset;
  text("#question", next.references.length ? styled : question);
  pair.classList.add("loading");
  images.forEach((image, i) => (image.src = next.images[i]));
  Promise.all(images.map((image) => image.decode())).then(
    () => {
      if (view !== next) return;
      for (const image of images) {
        image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
      }
      pair.style.setProperty("--ratio", images[0].naturalWidth / images[0].naturalHeight);
      pair.classList.remove("loading");
      requestAnimationFrame(() => (since = performance.now()));
      for (const url of next.ahead) new Image().src = url;
    },
    () => {
      if (view === next) note.textContent = unshown;
    },
  );
}

async function ask(call) {
  busy = true;
  const slow = setTimeout(() => (note.textContent = "Waiting for the server ..."), 1500);
  const next = await call();
  clearTimeout(slow);
  busy = false;
  if (next && !next.error) return show(next);
  for (const frame of frames) frame.classList.remove("picked");
  const lost = "The server does not answer, so this may not be saved. Choose again, or reload the page.";
  const words = next ? next.error : lost;
  for (const place of element.querySelectorAll(".note")) place.textContent = words;
}

function act(what) {
  if (busy || !view) return;
  if (what === "undo") {
    if (view.done) ask(() => server.undo({ name: view.name }));
  } else if (view.pair && what === "zoom") {
    zoom(null);
    pair.classList.toggle("zoomed");
  } else if (what === "unzoom") {
    pair.classList.remove("zoomed");
  } else if (view.pair && (since !== null || what === "skip")) {
    const seconds = since === null ? 0 : (performance.now() - since) / 1000;
    for (const frame of frames) frame.classList.toggle("picked", frame.dataset.picked.split(" ").includes(what));
    const { name, again } = view;
    ask(() => server.choose({ name, pair: view.pair, again, choice: what, seconds }));
  }
}

function start(name) {
  ask(() => server.start({ name })).then(() => {
    if (view) sessionStorage.setItem("annotator", name);
  });
}

document.addEventListener("keydown", (event) => {
  const what = KEYS[event.key.toLowerCase()];
  const typing = ["INPUT", "TEXTAREA"].includes(event.target.tagName);
  if (!what || !view || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!event.repeat) act(what);
});
for (const button of buttons) {
  button.addEventListener("click", () => {
    button.blur();
    act(button.dataset.do);
  });
}
for (const frame of frames) {
  frame.addEventListener("click", (event) => {
    zoom(event);
    pair.classList.toggle("zoomed");
  });
  frame.addEventListener("pointermove", (event) => {
    if (pair.classList.contains("zoomed")) zoom(event);
  });
}
find("#who").addEventListener("submit", (event) => {
  event.preventDefault();
  start(find("#name").value);
});
find("#leave").addEventListener("click", () => {
  sessionStorage.removeItem("annotator");
  if (props.value.login) location.href = "logout";
  else location.reload();
});

// With a password the name is that of the login, and comes with the page's first event.
if (props.value.login) {
  text("#leave", "log out");
  watch("value", () => start(props.value.name));
} else {
  find("#who").hidden = false;
  const before = sessionStorage.getItem("annotator");
  if (before) start(before);
}
