// One slider moves the line in all images of its grid: before is left of it, after right. Without this script they stand
// side by side.
for (const grid of document.querySelectorAll(".before-after")) {
  const slider = grid.querySelector("input");
  if (!slider) continue; // a grid of one step alone
  const uncover = () => {
    grid.style.setProperty("--at", slider.value + "%");
    slider.setAttribute("aria-valuetext", slider.value + " % " + slider.dataset.before + ", then " + slider.dataset.after);
  };
  grid.classList.add("on");
  slider.addEventListener("input", uncover);
  uncover();
}
