// One slider wipes all pictures of its grid from before to after. Without this script they stand side by side.
for (const grid of document.querySelectorAll(".wipe")) {
  const slider = grid.querySelector("input");
  const wipe = () => {
    grid.style.setProperty("--at", slider.value + "%");
    slider.setAttribute("aria-valuetext", slider.value + " % " + slider.dataset.after);
  };
  grid.classList.add("on");
  slider.addEventListener("input", wipe);
  wipe();
}
